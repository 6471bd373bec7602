"""Sign-in, also behind proxies: guesses are slow, cookies are secure, clients are told apart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from helpers.service import BASE, OTHER, PROXY, ServiceHarness, from_address
from typer.testing import CliRunner

from llmprune.cli.main import app
from llmprune.common.errors import RecipeError
from llmprune.service import server
from llmprune.service.settings import Settings

TLS = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}


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
    sessions = harness.service.sessions
    opened = [sessions.open_with(token) or "" for _ in range(25)]
    assert [sessions.caller(session) is not None for session in opened] == [False] * 5 + [True] * 20


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
