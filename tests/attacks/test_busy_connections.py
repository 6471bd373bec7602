"""Connections that ask nothing, slowly, or for too much at a time: everybody else is served."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2 as httpx
import pytest
import uvicorn
from service_tools import RECIPE, YAML, free_port, served, settings_in

from llmprune.service.api.app import create_app
from llmprune.service.connections import LimitedProtocol, Patience, Register, is_among
from llmprune.service.limits import InFlight, RateLimit, network_of

HURRY = Patience(headers=0.4, body=0.4, reading=0.8)


@dataclass
class Live:
    """A server in a thread of this process."""

    port: int
    register: Register
    http: httpx.Client

    def connect(self) -> socket.socket:
        """A new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def is_closed(self, connection: socket.socket, seconds: float) -> bool:
        """Whether the server closes a connection within some seconds."""
        connection.settimeout(seconds)
        try:
            while connection.recv(65_536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A server with little patience, on which an address may have few connections."""
    register = Register(patience=HURRY, most_waiting=4, most=12)
    app = create_app(settings_in(tmp_path, streams=3, requests=8))
    config = uvicorn.Config(
        app, port=(port := free_port()), http=partial(LimitedProtocol, register), log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
        yield Live(port, register, http)
    server.should_exit = server.force_exit = True
    thread.join(10)


def test_500_silent_connections_lock_nobody_out(tmp_path: Path) -> None:
    """The service answers others, health and a new job meanwhile, and its log stays short."""
    with served(tmp_path) as (client, settings):
        silent = [socket.create_connection(("127.0.0.1", settings.port), timeout=10) for _ in range(500)]
        for half in silent[::2]:
            with contextlib.suppress(OSError):
                half.send(b"GET / HTTP/1.1\r\nHost:")
        with httpx.Client(base_url=client.server, timeout=5) as other:
            for path in ("/v1/health", "/v1/metrics", "/v1/jobs", "/"):
                assert other.get(path).status_code == 200, path
            assert other.post("/v1/jobs", content=RECIPE, headers=YAML).status_code == 201
        for one in silent:
            one.close()
    assert len((tmp_path / "serve.log").read_text().splitlines()) < 12


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_headers_that_never_end(live: Live, head: bytes) -> None:
    """A connection without a whole request is closed, also where a byte comes now and then."""
    with live.connect() as slow:
        slow.send(head)
        for _ in range(8):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                slow.send(b"x")
        assert live.is_closed(slow, 1.0)
    assert live.http.get("/v1/health").status_code == 200


def test_a_body_that_never_ends(live: Live) -> None:
    """A body that comes byte by byte is cut off, whether the request was refused before or waits for it."""
    for path in (b"/v1/jobs", b"/v1/nothing"):
        with live.connect() as slow:
            slow.send(
                b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/yaml\r\nContent-Length: 999\r\n\r\n"
                % path
            )
            for _ in range(8):
                time.sleep(0.1)
                with contextlib.suppress(OSError):
                    slow.send(b"#")
            assert live.is_closed(slow, 1.0), path


def test_an_idle_connection_after_an_answer(live: Live) -> None:
    """Keeping a connection alive gives no more time than a new one has."""
    with live.connect() as kept:
        kept.send(b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200 OK" in kept.recv(65_536)
        kept.send(b"G")
        assert live.is_closed(kept, 2.0)


def test_an_answer_that_nobody_reads(live: Live, tmp_path: Path) -> None:
    """A download whose client takes nothing for a while ends; one that is read slowly arrives whole."""
    job = live.http.post("/v1/jobs", content=RECIPE, headers=YAML).json()["id"]
    large = tmp_path / "data" / "jobs" / job / "run" / "large.bin"
    large.parent.mkdir(parents=True)
    large.write_bytes(bytes(8_000_000))
    ask = b"GET /v1/jobs/%s/artifacts/large.bin HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % job.encode()
    with live.connect() as deaf, live.connect() as slow:
        deaf.send(ask)
        slow.send(ask)
        assert received(slow, pause=0.005) > 8_000_000
        time.sleep(1.0)
        assert received(deaf) < 8_000_000


def received(connection: socket.socket, pause: float = 0.0) -> int:
    """The bytes that arrive in a connection until nothing more comes."""
    connection.settimeout(1)
    taken = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(100_000):
            taken += len(part)
            time.sleep(pause)
    return taken


def test_an_address_has_few_silent_connections(live: Live) -> None:
    """The oldest silent connection gives way to a new one; connections at work stay."""
    with httpx.Client(base_url=live.http.base_url, timeout=10) as stream:
        job = live.http.post("/v1/jobs", content=RECIPE, headers=YAML).json()["id"]
        with stream.stream("GET", f"/v1/jobs/{job}/events") as events:
            lines = events.iter_lines()
            assert next(lines).startswith("event:")
            silent = [live.connect() for _ in range(20)]
            assert live.is_closed(silent[0], 0.2)
            assert live.http.get("/v1/jobs").status_code == 200
            assert live.http.post(f"/v1/jobs/{job}/cancel").status_code == 200
            assert any("cancelled" in line for line in lines), "the stream outlives every time limit and arrives"
            for one in silent:
                one.close()


def test_streams_of_one_user_leave_room_for_others(live: Live) -> None:
    """More event streams than a user may have are refused with a remedy; health, lists and metrics are answered."""
    job = live.http.post("/v1/jobs", content=RECIPE, headers=YAML).json()["id"]
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(httpx.Client(base_url=live.http.base_url, timeout=10)) for _ in range(6)]
        answers = [held.enter_context(one.stream("GET", f"/v1/jobs/{job}/events")) for one in clients]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429, 429]
        assert answers[-1].headers["Retry-After"] == "5"
        for path in ("/v1/health", "/v1/metrics", "/v1/jobs"):
            assert live.http.get(path).status_code == 200
        assert live.http.post(f"/v1/jobs/{job}/cancel").status_code == 200
    for _ in range(100):  # the server has seen the ends of the streams
        if live.http.get(f"/v1/jobs/{job}/events").status_code == 200:
            return
        time.sleep(0.1)
    pytest.fail("the places of ended streams stay taken")


def test_the_register_counts_by_address() -> None:
    """Of many connections the longest silent one goes; a trusted proxy may hold more, and a busy one stays."""

    class Fake:
        def __init__(self, address: str) -> None:
            self.address, self.transport, self.aborted = address, self, False

        def abort(self) -> None:
            self.aborted = True

    def held(register: Register, addresses: list[str]) -> list[Fake]:
        made = [Fake(address) for address in addresses]
        for one in made:
            register.opened(one)  # type: ignore[arg-type]
            register.waits(one)  # type: ignore[arg-type]
        return made

    register = Register(most_waiting=2, most=100, trusted=("10.0.0.0/8",))
    assert [one.aborted for one in held(register, ["1.1.1.1"] * 4)] == [True, True, False, False]
    assert not any(one.aborted for one in held(register, ["10.1.2.3"] * 9))
    full = Register(most_waiting=99, most=3)
    first = held(full, ["1.1.1.1", "2.2.2.2", "3.3.3.3"])
    full.works(first[0])  # type: ignore[arg-type]
    held(full, ["4.4.4.4"])
    assert [one.aborted for one in first] == [False, True, False]


def test_what_counts_as_one_client() -> None:
    """Of IPv6 a client has half the address; a mapped IPv4 address is that address."""
    assert network_of("2001:db8:1:2:3:4:5:6") == network_of("2001:db8:1:2::1") == "2001:db8:1:2::/64"
    assert network_of("2001:db8:1:3::1") != network_of("2001:db8:1:2::1")
    assert network_of("::ffff:1.2.3.4") == network_of("1.2.3.4") == "1.2.3.4"
    assert network_of("testclient") == "testclient"
    assert is_among("10.1.2.3", ("10.0.0.0/8",))
    assert not is_among("11.1.2.3", ("10.0.0.0/8", "::1"))


def test_counting_what_is_in_flight() -> None:
    """A place is free again when the block has ended, also by an error; a refused one takes none."""
    flying = InFlight()
    with flying.counted({"a": 1, "b": 2}) as first, flying.counted({"a": 1, "b": 2}) as second:
        assert (first, second) == (True, False)
        with flying.counted({"b": 2}) as third:
            assert third
    with pytest.raises(ZeroDivisionError), flying.counted({"a": 1}):
        raise ZeroDivisionError
    assert not flying._counts
    rate = RateLimit(rate=0.001, burst=1)
    assert [rate.wait("a", take=False), rate.wait("a", take=False), rate.wait("a")] == [0, 0, 0]
    assert rate.wait("a", take=False) > 0
