"""The logs that tell who did what: complete, short, and without secrets."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from helpers.service import BASE, OTHER, RECIPE, YAML, ServiceHarness, from_address, served
from typer.testing import CliRunner

from llmprune.cli.main import app
from llmprune.service.logs import ACCESS, AUDIT, kept
from llmprune.service.supervisor.cleanup import over_quota


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_who_did_what_is_in_the_audit_log(closed: tuple[ServiceHarness, str]) -> None:
    """Every attempt to change something: who, from where, which job, how it ended. Questions are not in it."""
    harness, token = closed
    folder = harness.settings.data_dir
    http, bearer = from_address(harness, OTHER), {"Authorization": f"Bearer {token}"}
    with kept(folder):
        job = http.post("/v1/jobs", content=RECIPE, headers=YAML | bearer).json()["id"]
        http.post("/v1/recipes/validate", content=RECIPE, headers=YAML | bearer)
        http.get("/v1/jobs", headers=bearer)
        http.post(f"/v1/jobs/{job}/cancel", headers=bearer)
        http.post("/login", data={"token": "wrong"})
        http.post("/login", data={"token": token})
        http.post(f"/jobs/{job}/delete")
        http.post("/jobs/%1b%5b2J/delete")
        http.post("/logout")
    found = [
        tuple(line[key] for key in ("address", "caller", "action", "job", "status")) for line in lines(folder / AUDIT)
    ]
    assert found == [
        (OTHER, "ann", "POST /v1/jobs", None, 201),
        (OTHER, "ann", "POST /v1/jobs/{job}/cancel", job, 200),
        (OTHER, None, "POST /login", None, 401),
        (OTHER, "ann", "POST /login", None, 303),
        (OTHER, "ann", "POST /jobs/{job}/delete", job, 303),
        (OTHER, "ann", "POST /jobs/{job}/delete", "\x1b[2J", 404),
        (OTHER, "ann", "POST /logout", None, 303),
    ]
    assert lines(folder / AUDIT)[0]["location"] == f"/v1/jobs/{job}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines(folder / AUDIT)[0]["time"])
    asked = [(line["method"], line["path"], line["status"]) for line in lines(folder / ACCESS)]
    assert ("GET", "/v1/jobs", 200) in asked
    assert len(asked) == 9
    text = (folder / AUDIT).read_text() + (folder / ACCESS).read_text()
    assert token not in text
    assert text.replace("\n", "").isprintable(), "a path with an escape sequence is escaped"


def test_refusals_and_errors_are_logged_too(
    closed: tuple[ServiceHarness, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another site's attempt, an error of the service and a full queue have lines; a flood of refusals has few."""
    harness, token = closed
    folder, http = harness.settings.data_dir, from_address(harness, OTHER)
    http = TestClient(harness.app, base_url=BASE, client=(OTHER, 1), raise_server_exceptions=False)
    bearer = {"Authorization": f"Bearer {token}"}

    def fail(*_: object) -> None:
        raise RuntimeError

    with kept(folder):
        http.post("/v1/jobs", content=RECIPE, headers=YAML | bearer | {"Origin": "https://evil.example"})
        monkeypatch.setattr(harness.service.jobs.__class__, "add", fail)
        http.post("/v1/jobs", content=RECIPE, headers=YAML | bearer)
        for _ in range(60):
            http.post("/login", data={"token": "wrong"})
    found = [(line["caller"], line["status"]) for line in lines(folder / AUDIT)]
    assert found[:2] == [("ann", 403), ("ann", 500)]
    assert found.count((None, 401)) == 10
    assert 1 <= found.count((None, 429)) <= 11
    assert [line["status"] for line in lines(folder / ACCESS)][1] == 500
    assert {(folder / name).stat().st_mode & 0o777 for name in (ACCESS, AUDIT)} == {0o600}


def test_floods_leave_the_logs_short(closed: tuple[ServiceHarness, str]) -> None:
    """Lines have a bounded length and number, so that nobody fills the disk or washes away what came before."""
    harness, token = closed
    folder, http = harness.settings.data_dir, from_address(harness, OTHER)
    foreign = {"Sec-Fetch-Site": "cross-site"}
    with kept(folder):
        for _ in range(300):
            http.request("X" * 5_000, "/login", headers=foreign)
            http.post("/login?" + "x" * 5_000, headers=foreign)
            http.get("/" + "\U0001f600" * 1_000)
        http.post("/logout", headers={"Authorization": f"Bearer {token}"})
    assert (folder / AUDIT).stat().st_size < 20_000
    assert (folder / ACCESS).stat().st_size < 50_000
    assert max(len(line) for line in (folder / ACCESS).read_text().splitlines()) < 500
    assert lines(folder / AUDIT)[-1]["action"] == "POST /logout"


def test_logs_and_table_do_not_count_for_the_quota(tmp_path: Path) -> None:
    """What no clean-up can take must not keep jobs from starting."""
    harness = ServiceHarness(tmp_path, disk_quota=5_000_000)
    (harness.settings.data_dir / AUDIT).write_bytes(bytes(20_000_000))
    assert not over_quota(harness.settings)
    (harness.settings.data_dir / "jobs" / "large").write_bytes(bytes(20_000_000))
    assert over_quota(harness.settings)


def test_a_user_without_a_name_gets_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the user may have no entry in the table of users."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nobody)
    made = CliRunner().invoke(app, ["token", "create", "--name", "ann", "--data-dir", str(tmp_path)])
    assert (made.exit_code, made.output.startswith("llmprune_")) == (0, True)
    assert lines(tmp_path / AUDIT)[0]["caller"].startswith("uid ")


def test_tokens_made_on_the_machine_are_in_the_audit_log(tmp_path: Path) -> None:
    """Creation and revocation, by the user of the machine; the token itself is not there."""
    where = ["--data-dir", str(tmp_path)]
    made = CliRunner().invoke(app, ["token", "create", "--name", "ann", *where]).output.strip()
    CliRunner().invoke(app, ["token", "revoke", "--name", "ann", *where])
    assert [(line["action"], line["token"]) for line in lines(tmp_path / AUDIT)] == [
        ("token create", "ann"),
        ("token revoke", "ann"),
    ]
    assert made not in (tmp_path / AUDIT).read_text()
    assert (tmp_path / AUDIT).stat().st_mode & 0o077 == 0


def test_a_running_service_logs_with_the_time(tmp_path: Path) -> None:
    """Both logs are written, lines on standard error bear their time, and garbage of clients is not in them."""
    import socket

    with served(tmp_path) as (client, settings):
        client.submit(RECIPE).cancel()
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", settings.port)) as garbage:
                garbage.send(b"\x1b[2J garbage\r\n\r\n" + bytes(20_000))
                with contextlib.suppress(ConnectionError):
                    garbage.recv(1_000)
    assert [line["action"] for line in lines(settings.data_dir / AUDIT)][:2] == [
        "POST /v1/jobs",
        "POST /v1/jobs/{job}/cancel",
    ]
    said = (tmp_path / "serve.log").read_text()
    assert "garbage" not in said.lower()
    assert "Invalid HTTP" not in said
    rest = [line for line in said.splitlines() if not line.startswith("llmprune serves")]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line) for line in rest), said
