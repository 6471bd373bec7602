"""Steps of tests about follow-ups."""

from __future__ import annotations

from typing import Any

from helpers.service import ServiceHarness, recipe

KINDS = ["evaluate", "bench", "size", "recover", "sparsify", "repeat"]


def finished(harness: ServiceHarness, **behaviour: object) -> str:
    """Run a job to its end and return its id."""
    job: str = harness.submit(recipe(layers=1, **behaviour))["id"]
    assert harness.until_ended(job)["figures"]
    return job


def ask(client: Any, job: str, work: dict[str, Any], **settings: Any) -> Any:
    """Ask for a follow-up and return the answer."""
    return client.post(f"/v1/jobs/{job}/follow-ups", json={"work": work} | settings)


def made(harness: ServiceHarness, job: str, kind: str, **work: Any) -> dict[str, Any]:
    """Ask for a follow-up and return its job."""
    answer = ask(harness.http, job, {"kind": kind} | work)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def cancelled(harness: ServiceHarness, job: str) -> None:
    """Cancel a job that waits."""
    assert harness.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
