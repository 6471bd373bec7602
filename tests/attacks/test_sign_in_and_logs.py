"""Sign-in behind proxies, and the logs that tell who did what."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import re
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from helpers.service import BASE, RECIPE, YAML, ServiceHarness, served
from typer.testing import CliRunner

from llmprune.cli.main import app
from llmprune.common.errors import RecipeError
from llmprune.service import server
from llmprune.service.logs import ACCESS, AUDIT, kept
from llmprune.service.settings import Settings
from llmprune.service.supervisor.cleanup import over_quota

PROXY, OTHER = "10.0.0.1", "10.9.9.9"
TLS = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}


def from_address(harness: ServiceHarness, address: str) -> TestClient:
    """A client at an address."""
    return TestClient(harness.app, base_url=BASE, client=(address, 50_000), follow_redirects=False)


@pytest.fixture
def closed(tmp_path: Path) -> tuple[ServiceHarness, str]:
    """A service behind a proxy, and a user's token."""
    harness = ServiceHarness(tmp_path, trusted_proxies=(PROXY,))
    return harness, harness.service.tokens.create("ann", "user")


def test_guessing_at_the_sign_in_is_slow(closed: tuple[ServiceHarness, str]) -> None:
    """After ten wrong tokens an address waits, also for the right one; another address signs in at once."""
    harness, token = closed
    http = from_address(harness, OTHER)
    codes = [http.post("/login", data={"token": f"wrong{n}"}).status_code for n in range(14)]
    assert codes == [401] * 10 + [429] * 4
    assert http.post("/login", data={"token": token}).status_code == 429
    assert http.get("/login").status_code == 200
    assert from_address(harness, "10.9.9.8").post("/login", data={"token": token}).status_code == 303
    fine = from_address(harness, "10.9.9.7")
    assert {fine.post("/login", data={"token": token}).status_code for _ in range(15)} == {303}, "only mistakes count"


def test_a_page_of_an_ended_session_locks_nobody_out(closed: tuple[ServiceHarness, str]) -> None:
    """A page that asks on and on without a session is sent to the sign-in, and does not count as guessing."""
    harness, token = closed
    http = from_address(harness, OTHER)
    asks = {"HX-Request": "true", "HX-Current-URL": f"{BASE}/jobs/0123456789ab"}
    answers = [http.get("/now", headers=asks | {"Cookie": "llmprune_session=gone"}) for _ in range(40)]
    assert {(answer.status_code, answer.headers["HX-Redirect"]) for answer in answers} == {
        (401, "/login?next=/jobs/0123456789ab")
    }
    assert {http.get("/v1/metrics").status_code for _ in range(40)} == {401}
    assert http.post("/login", data={"token": token}).status_code == 303


def test_a_person_who_must_wait_gets_a_page(closed: tuple[ServiceHarness, str]) -> None:
    """Too many sign-ins are refused in the form in which the page was asked for."""
    harness, _ = closed
    http = from_address(harness, OTHER)
    answers = [http.post("/login", data={"token": "x"}, headers={"Accept": "text/html"}) for _ in range(12)]
    assert (answers[-1].status_code, answers[-1].headers["Content-Type"]) == (429, "text/html; charset=utf-8")
    assert "too many requests" in answers[-1].text


def test_clients_behind_a_proxy_are_told_apart(closed: tuple[ServiceHarness, str]) -> None:
    """By X-Forwarded-For of a trusted proxy one client's mistakes are not another's; anybody else's is not believed."""
    harness, token = closed
    proxy, liar = from_address(harness, PROXY), from_address(harness, OTHER)
    for _ in range(12):
        proxy.post("/login", data={"token": "wrong"}, headers=TLS)
    assert proxy.post("/login", data={"token": token}, headers=TLS).status_code == 429
    assert proxy.post("/login", data={"token": token}, headers={"X-Forwarded-For": "203.0.113.8"}).status_code == 303
    codes = [
        liar.post("/login", data={"token": "wrong"}, headers={"X-Forwarded-For": f"203.0.113.{n}"}).status_code
        for n in range(12)
    ]
    assert codes[-1] == 429


def test_the_cookie_is_secure_where_the_browser_speaks_tls(closed: tuple[ServiceHarness, str]) -> None:
    """Told by the trusted proxy, or by the page's own origin; without TLS the cookie goes as it can."""
    harness, token = closed
    proxy, other = from_address(harness, PROXY), from_address(harness, OTHER)

    def cookie(http: TestClient, **headers: str) -> str:
        answer = http.post("/login", data={"token": token}, headers=headers)
        assert answer.status_code == 303
        return answer.headers["Set-Cookie"]

    assert "; Secure" in cookie(proxy, **TLS)
    assert "; Secure" not in cookie(other, **TLS)
    assert "; Secure" in cookie(other, Origin="https://127.0.0.1:8321")
    assert "; Secure" not in cookie(other, Origin="http://127.0.0.1:8321")


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
        (OTHER, "ann", "POST /jobs/{job}/delete", "\x1b[2J", 422),
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


def test_many_sign_ins_at_once_are_counted(closed: tuple[ServiceHarness, str]) -> None:
    """Guesses that arrive together are counted when they come, not when they are answered."""
    harness, _ = closed
    app: Any = harness.app
    transport = httpx.ASGITransport(app=app, client=(OTHER, 1))

    async def guess() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as http:
            sent = (http.post("/login", data={"token": f"wrong{n}"}) for n in range(40))
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    assert asyncio.run(guess()).count(401) <= 11


def test_a_token_has_few_sessions(closed: tuple[ServiceHarness, str]) -> None:
    """The oldest session of a token ends when there are too many."""
    harness, token = closed
    tokens = harness.service.tokens
    opened = [tokens.open_session(token) or "" for _ in range(25)]
    assert [tokens.session_caller(session) is not None for session in opened] == [False] * 5 + [True] * 20


def test_an_owner_has_a_number_of_jobs(tmp_path: Path) -> None:
    """Jobs that are submitted and cancelled again do not fill the table; what to do is said."""
    harness = ServiceHarness(tmp_path, max_jobs=3)
    for _ in range(3):
        harness.http.post(f"/v1/jobs/{harness.submit()['id']}/cancel")
    answer = harness.http.post("/v1/jobs", content=RECIPE, headers=YAML)
    assert (answer.status_code, "3 are kept; delete some" in answer.text) == (429, True)


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
        job = client.submit(RECIPE)["id"]
        client.cancel(job)
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


def test_a_network_of_proxies_is_written_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address with the width of its network names that network, and its proxies are believed."""
    chosen: list[Settings] = []
    monkeypatch.setattr(server, "serve", chosen.append)
    names = ("10.1.2.3/8", "192.0.2.1", "2001:db8::1")
    options = [part for name in names for part in ("--trusted-proxy", name)]
    result = CliRunner().invoke(app, ["serve", "--gpus", "none", "--data-dir", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert chosen[0].trusted_proxies == ("10.0.0.0/8", "192.0.2.1/32", "2001:db8::1/128")
    harness = ServiceHarness(tmp_path, trusted_proxies=chosen[0].trusted_proxies)
    token = harness.service.tokens.create("ann", "user")
    for address in ("10.200.0.1", "192.0.2.1", "2001:db8::1"):
        answer = from_address(harness, address).post("/login", data={"token": token}, headers=TLS)
        assert "; Secure" in answer.headers["Set-Cookie"], address


def test_a_wrong_proxy_is_refused() -> None:
    """--trusted-proxy takes addresses and networks."""
    result = CliRunner().invoke(app, ["serve", "--trusted-proxy", "proxy.example"])
    assert isinstance(result.exception, RecipeError)
    assert "--trusted-proxy 'proxy.example'" in str(result.exception)
