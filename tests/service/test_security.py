"""Access rules, limits and secrets: each with everything that tries to break it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.common.errors import RecipeError
from llmprune.service.api.files.outputs import read_log
from llmprune.service.server import require_token
from llmprune.service.supervisor.processes import processes_of_job


def test_nobody_else_reaches_it_without_a_token(tmp_path: Path) -> None:
    """An address that others can reach needs a token, and nobody gets in once the last one is revoked."""
    harness = ServiceHarness(tmp_path, host="0.0.0.0")
    with pytest.raises(RecipeError, match="a token is needed first"):
        require_token(harness.settings, harness.service.tokens)
    token = harness.service.tokens.create("ann", "user")
    require_token(harness.settings, harness.service.tokens)
    harness.service.tokens.revoke("ann")
    for headers in ({}, {"Authorization": f"Bearer {token}"}, {"Host": "127.0.0.1"}):
        assert harness.http.get("/v1/jobs", headers=headers).status_code == 401


@pytest.fixture
def closed(tmp_path: Path) -> tuple[ServiceHarness, str, str]:
    """A service with the tokens of an admin and of a user."""
    harness = ServiceHarness(tmp_path)
    return harness, harness.service.tokens.create("root", "admin"), harness.service.tokens.create("ann", "user")


def bearer(token: str) -> dict[str, str]:
    """Return the header of a token."""
    return {"Authorization": f"Bearer {token}"}


def test_tokens_are_asked_for_everywhere(closed: tuple[ServiceHarness, str, str]) -> None:
    """Once there is a token, every route needs one, except health, readiness, sign-in and static files."""
    harness, _, token = closed
    document = harness.app.openapi()
    for path in document["paths"]:
        answer = harness.http.get(path.replace("{job}", "0" * 12).replace("{name}", "x"))
        assert (answer.status_code == 401) == (path not in ("/v1/health", "/v1/ready")), path
        harness.app.middleware_stack = None  # forgets who has sent wrong tokens
    for path in ("/v1/openapi.json", "/", "/submit", "/compare", "/now"):
        assert harness.http.get(path, headers={"Accept": "text/plain"}).status_code == 401
        assert harness.http.get(path, headers=bearer(token)).status_code == 200
        harness.app.middleware_stack = None
    for wrong in ("Bearer", f"Basic {token}", f"Bearer {token}x", "Bearer ' OR 1=1 --", f"bearer{token}"):
        assert harness.http.get("/v1/jobs", headers={"Authorization": wrong}).status_code == 401


def test_only_digests_are_kept(closed: tuple[ServiceHarness, str, str]) -> None:
    """The database's files contain neither tokens nor sessions."""
    harness, admin, user = closed
    session = harness.service.sessions.open_with(user)
    kept = b"".join(path.read_bytes() for path in harness.settings.data_dir.glob("service.sqlite3*"))
    for secret in (admin, user, session, admin.removeprefix("llmprune_")):
        assert secret.encode() not in kept
    with sqlite3.connect(harness.settings.database) as connection:
        assert len(connection.execute("SELECT * FROM tokens").fetchall()) == 2


def test_sessions(closed: tuple[ServiceHarness, str, str]) -> None:
    """A token opens a session whose cookie scripts cannot read and other sites cannot send; it ends with its token."""
    harness, _, token = closed
    assert (
        harness.http.get("/", headers={"Accept": "text/html"}, follow_redirects=False).headers["Location"]
        == "/login?next=/"
    )
    assert harness.http.post("/login", data={"token": "wrong"}).status_code == 401
    answer = harness.http.post("/login", data={"token": token, "next": "//evil.example/x"}, follow_redirects=False)
    assert answer.headers["Location"] == "/"
    cookie = answer.headers["Set-Cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/"))
    assert harness.http.get("/").status_code == 200
    harness.service.tokens.revoke("ann")
    assert harness.http.get("/v1/jobs").status_code == 401


def test_users_change_only_their_own_jobs(closed: tuple[ServiceHarness, str, str]) -> None:
    """Another user's shared job can be read, but not changed; an admin may change it."""
    harness, admin, user = closed
    job = harness.submit(headers=bearer(admin), shared=True)["id"]
    ways = [("post", f"/v1/jobs/{job}/cancel"), ("post", f"/v1/jobs/{job}/retry"), ("delete", f"/v1/jobs/{job}")]
    ways += [("post", f"/jobs/{job}/{what}") for what in ("cancel", "retry", "reevaluate", "delete")]
    ways.append(("post", f"/v1/jobs/{job}/reevaluate"))
    for method, path in ways:
        assert getattr(harness.http, method)(path, headers=bearer(user)).status_code == 403, path
    assert harness.http.get(f"/v1/jobs/{job}", headers=bearer(user)).json()["state"] == "queued"
    refused = harness.http.post("/v1/jobs", content=RECIPE, params={"priority": 5}, headers=YAML | bearer(user))
    assert (refused.status_code, "only admins" in refused.text) == (422, True)
    own = harness.submit(headers=bearer(user))["id"]
    assert harness.http.post(f"/v1/jobs/{own}/cancel", headers=bearer(admin)).status_code == 200


def test_keys_of_different_owners_do_not_meet(closed: tuple[ServiceHarness, str, str]) -> None:
    """Idempotency keys of two users are independent; the same key with another body is a conflict."""
    harness, admin, user = closed
    key = {"Idempotency-Key": "k"}
    first = harness.submit(headers=bearer(user) | key)["id"]
    assert harness.submit(headers=bearer(user) | key)["id"] == first
    assert harness.submit(headers=bearer(admin) | key)["id"] != first
    other = harness.http.post("/v1/jobs", content=recipe(n=1), headers=YAML | bearer(user) | key)
    assert other.status_code == 409


def test_artefact_paths_stay_in_the_run_folder(tmp_path: Path) -> None:
    """Dots, their encodings, links, hidden files, absolute paths and invalid job ids are all refused."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit()["id"]
    harness.until_ended(job)
    (harness.settings.folder(job) / "hub-token").write_text("secret")
    run = harness.run_folder(job)
    (run / "link").symlink_to("/etc/passwd")
    (run / "up").symlink_to(harness.settings.data_dir)
    names = [
        *("../hub-token", "%2e%2e/hub-token", "..%2fhub-token", "%2e%2e%2fhub-token", "model/../../hub-token"),
        *(".lock", "/etc/passwd", "%2fetc%2fpasswd", "link", "up/service.sqlite3", "model", "", "..%5chub-token"),
        *("report.json%00", "../../../service.sqlite3"),
    ]
    for name in names:
        answer = harness.http.get(f"/v1/jobs/{job}/artifacts/{name}")
        assert answer.status_code in (404, 422) or answer.json() == listed(harness, job), name
        assert "secret" not in answer.text
    assert "link" not in {file["name"] for file in listed(harness, job)}
    for odd in ("..", "%2e%2e", "x", "0" * 13, "..%2f..", "0" * 11 + "G"):
        assert harness.http.get(f"/v1/jobs/{odd}/artifacts/report.json").status_code in (404, 422)


def listed(harness: ServiceHarness, job: str) -> list[dict[str, Any]]:
    """Return the job's list of artefacts."""
    found: list[dict[str, Any]] = harness.http.get(f"/v1/jobs/{job}/artifacts").json()
    return found


def test_limits_of_size_number_and_rate(tmp_path: Path) -> None:
    """Bodies, queued jobs and requests above their limits are refused, the last with Retry-After."""
    harness = ServiceHarness(tmp_path, body_limit=5_000, max_queued=3, burst=30, rate=0.05)
    assert harness.http.post("/v1/jobs", content=RECIPE + "#" * 6_000, headers=YAML).status_code == 413

    def endless() -> Any:
        for _ in range(100):
            yield b"#" * 1_000

    assert harness.http.post("/v1/jobs", content=endless(), headers=YAML).status_code == 411
    for _ in range(3):
        harness.submit()
    full = harness.http.post("/v1/jobs", content=RECIPE, headers=YAML)
    assert (full.status_code, "has 3 of 3" in full.text) == (429, True)
    codes = [harness.http.get("/v1/jobs").status_code for _ in range(40)]
    assert set(codes) == {200, 429}
    assert int(harness.http.get("/v1/jobs").headers["Retry-After"]) >= 1


def test_guessing_tokens_is_slow(closed: tuple[ServiceHarness, str, str]) -> None:
    """After ten wrong tokens an address has to wait, and valid tokens still pass."""
    harness, _, user = closed
    codes = [harness.http.get("/v1/jobs", headers=bearer(f"guess{n}")).status_code for n in range(15)]
    assert codes[:10] == [401] * 10
    assert set(codes[10:]) == {429}
    assert harness.http.get("/v1/jobs", headers=bearer(user)).status_code == 200


def test_a_jobs_hub_token_is_nowhere_else(tmp_path: Path) -> None:
    """The token is in no database, command line, environment, answer or log, and deleted when the job has ended."""
    harness = ServiceHarness(tmp_path)
    secret = "hf_" + "s3cr3t" * 5
    job = harness.submit(recipe(pause=0.4, say=f"{'x' * 990}{secret} was said"), headers={"X-Hub-Token": secret})["id"]
    harness.until(job, lambda found: found["total"] is not None)
    path = harness.settings.folder(job) / "hub-token"
    assert (path.read_text(), path.stat().st_mode & 0o777) == (secret, 0o600)
    processes = processes_of_job(job)
    assert any(process.environ().get("HF_TOKEN_PATH") == str(path) for process in processes)
    for process in psutil.process_iter(["cmdline"]):
        assert secret not in str(process.info["cmdline"])
    assert all(secret not in str(process.environ()) for process in processes)
    # the recipe of this test names it, which a person's does not; the table has it nowhere else
    with sqlite3.connect(harness.settings.database) as connection:
        rows = connection.execute("SELECT owner, name, overrides, launcher, error FROM jobs").fetchall()
        rows += connection.execute("SELECT data FROM events").fetchall()
        rows += connection.execute("SELECT key, digest FROM idempotency").fetchall()
    assert secret not in str(rows)
    for offset in range(960, 1020, 7):
        assert secret[3:20].encode() not in read_log(harness.service, job, offset=offset)[0]
    log = harness.http.get(f"/v1/jobs/{job}/log").text
    assert secret not in log
    assert "*" * len(secret) in log
    harness.until_ended(job)
    assert not path.exists()
    assert secret.encode() not in (harness.settings.folder(job) / "log.txt").read_bytes()


def test_the_services_own_token_stays_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job does not inherit the tokens of its service and of a cluster."""
    monkeypatch.setenv("LLMPRUNE_TOKEN", "mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    harness = ServiceHarness(tmp_path)
    job = harness.submit(recipe(pause=0.3))["id"]
    harness.until(job, lambda found: found["total"] is not None)
    assert all("mine" not in process.environ().values() for process in processes_of_job(job))
    harness.until_ended(job)


def test_the_data_folder_is_the_services_own(tmp_path: Path) -> None:
    """Other users of the machine cannot read the data folder."""
    harness = ServiceHarness(tmp_path)
    assert os.stat(harness.settings.data_dir).st_mode & 0o077 == 0
