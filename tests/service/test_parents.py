"""Jobs that follow-ups are made of: who may ask, budgets, and files that are shared or being deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from helpers.follow_ups import ask, cancelled, finished, made
from helpers.service import BASE, ServiceHarness, recipe

from llmprune.service.supervisor.cleanup import clean_up, used_bytes
from llmprune.service.users.quotas import set_own_quotas
from llmprune.service.users.tokens import Tokens


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with a disk quota that is never reached."""
    return ServiceHarness(tmp_path_factory.mktemp("parents"), disk_quota=10**12)


def test_a_clean_up_that_was_killed_is_completed(harness: ServiceHarness) -> None:
    """A model in the trash is deleted and its job marked; a model that two jobs share counts once."""
    parent = finished(harness)
    shared = made(harness, parent, "evaluate", tasks=["arc_easy"])["id"]
    harness.until_ended(shared)
    model = harness.run_folder(parent) / "model"
    both = used_bytes(harness.settings.data_dir / "jobs")
    harness.settings.trash.mkdir()
    (harness.settings.trash / parent).mkdir()
    model.rename(harness.settings.trash / parent / "model")
    clean_up(harness.settings, harness.service.jobs)
    assert harness.job(parent)["cleaned"]
    assert not list(harness.settings.trash.iterdir())
    assert (harness.run_folder(shared) / "model" / "model.safetensors").is_file()
    assert used_bytes(harness.settings.data_dir / "jobs") == both


def test_a_budget_is_changed_by_its_fraction(harness: ServiceHarness) -> None:
    """A job with a budget for the parameters takes ``keep``, and no layers; another budget takes neither."""
    text = recipe(layers=1).replace("depth: {remove: 1}", "budget: {parameters: 0.8}")
    job = harness.submit(text)["id"]
    weights = harness.submit(text.replace("parameters", "weights"))["id"]
    harness.until_ended(weights)
    smaller = made(harness, job, "size", keep=0.6)
    assert "budget.parameters=0.6" in smaller["overrides"]
    assert "60%" in smaller["name"]
    assert "give that alone" in ask(harness.http, job, {"kind": "size", "layers": 1}).text
    offers = {one["kind"]: one["reason"] for one in harness.http.get(f"/v1/jobs/{weights}/follow-ups").json()["offers"]}
    assert "limits weights" in offers["size"]
    cancelled(harness, smaller["id"])


def test_only_readers_may_ask_and_own_what_they_ask_for(tmp_path: Path) -> None:
    """A private job does not exist for others; of a shared one they make follow-ups of their own."""
    harness = ServiceHarness(tmp_path)
    parent, tokens = finished(harness), Tokens(harness.service.database)
    ann, bob = (
        TestClient(harness.app, base_url=BASE, headers={"Authorization": f"Bearer {tokens.create(name, 'user')}"})
        for name in ("ann", "bob")
    )
    for shared, status in ((0, 404), (1, 201)):
        with harness.service.database.write() as connection:
            connection.execute("UPDATE jobs SET owner = 'ann', shared = ? WHERE id = ?", (shared, parent))
        own = ask(bob, parent, {"kind": "bench"})
        assert own.status_code == status
        assert bob.get(f"/v1/jobs/{parent}/follow-ups").status_code == {404: 404, 201: 200}[status]
    job = own.json()
    assert job["owner"] == "bob"
    assert ann.get(f"/v1/jobs/{job['id']}").status_code == 404
    set_own_quotas(harness.service.database, "bob", quotas={"queued": 1})
    refused = ask(bob, parent, {"kind": "bench"})
    assert (refused.status_code, "'Jobs waiting': bob has 1 of 1" in refused.text) == (429, True)
    viewer = {"Authorization": f"Bearer {tokens.create('eve', 'viewer')}"}
    eve = TestClient(harness.app, base_url=BASE, headers=viewer)
    assert ask(eve, parent, {"kind": "bench"}).status_code == 403
    assert 'name="kind"' not in eve.get(f"/jobs/{parent}", headers={"Accept": "text/html"}).text
    assert job["id"] not in [one["id"] for one in ann.get(f"/v1/jobs/{parent}/follow-ups").json()["jobs"]]
    assert parent in bob.get(f"/jobs/{job['id']}", headers={"Accept": "text/html"}).text
    refused = ann.delete(f"/v1/jobs/{parent}").json()["detail"]
    assert "a job of another user reads" in refused
    assert job["id"] not in refused
    assert "only admins" in ask(bob, parent, {"kind": "bench"}, priority=5).text
