"""Connections that ask nothing, slowly, or for too much at a time: everybody else is served."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h11
import httpx2 as httpx
import pytest
import uvicorn
from helpers.service import RECIPE, YAML, served, settings_in

from llmprune.service.api.app import create_app
from llmprune.service.api.rate_limit import InFlight, RateLimit, network_of
from llmprune.service.connections import BACKLOG, LimitedProtocol, Patience, Register, is_among, most_connections

CALM = Patience(headers=60, body=60, reading=60)
HURRY = Patience(headers=0.5, body=0.5, reading=0.8)


@dataclass
class Live:
    """A server in a thread of this process."""

    port: int
    folder: Path
    http: httpx.Client

    def connect(self) -> socket.socket:
        """A new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def is_closed(self, connection: socket.socket, seconds: float) -> bool:
        """Check whether the server closes a connection within some seconds."""
        connection.settimeout(seconds)
        try:
            while connection.recv(65_536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def submit(self) -> str:
        """A queued job."""
        job: str = self.http.post("/v1/jobs", content=RECIPE, headers=YAML).json()["id"]
        return job

    def write(self, job: str, name: str, size: int) -> None:
        """Write a file of a job."""
        path = self.folder / "data" / "jobs" / job / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


@contextlib.contextmanager
def running(folder: Path, patience: Patience) -> Iterator[Live]:
    """A server on which an address may have 4 silent connections, behind a line that holds little."""
    register = Register(patience=patience, most_waiting=4, most=30)
    app = create_app(settings_in(folder, streams=3, requests=8))
    config = uvicorn.Config(app, http=partial(LimitedProtocol, register), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            yield Live(port, folder, http)
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Live]:
    """A server with patience."""
    with running(tmp_path, CALM) as live:
        yield live


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Live]:
    """A server without."""
    with running(tmp_path, HURRY) as live:
        yield live


UNFINISHED = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/yaml\r\nContent-Length: 9\r\n\r\n"


def test_500_silent_connections_lock_nobody_out(tmp_path: Path) -> None:
    """The service answers others, health and a new job meanwhile, and its log stays short."""
    with served(tmp_path) as (client, settings):
        silent = [socket.create_connection(("127.0.0.1", settings.port), timeout=10) for _ in range(500)]
        for number, one in enumerate(silent):
            with contextlib.suppress(OSError):
                one.send((b"", b"GET / HTTP/1.1\r\nHost:", UNFINISHED)[number % 3])
        for address in ("127.0.0.1", "127.0.0.2"):
            transport = httpx.HTTPTransport(local_address=address)
            with httpx.Client(base_url=client.server, timeout=5, transport=transport) as other:
                for path in ("/v1/health", "/v1/metrics", "/v1/jobs", "/"):
                    assert other.get(path).status_code == 200, path
                assert other.post("/v1/jobs", content=RECIPE, headers=YAML).status_code == 201
        for one in silent:
            one.close()
    assert len((tmp_path / "serve.log").read_text().splitlines()) < 6


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_headers_that_never_end(hasty: Live, head: bytes) -> None:
    """A connection without a whole request is closed, also where a byte comes now and then."""
    with hasty.connect() as slow:
        slow.send(head)
        for _ in range(8):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                slow.send(b"x")
        assert hasty.is_closed(slow, 1.0)
    assert hasty.http.get("/v1/health").status_code == 200


def test_a_body_that_never_ends(hasty: Live) -> None:
    """A body that comes byte by byte is cut off, whether the request was refused before or waits for it."""
    for path in (b"/v1/jobs", b"/v1/nothing"):
        with hasty.connect() as slow:
            slow.send(
                b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/yaml\r\nContent-Length: 999\r\n\r\n"
                % path
            )
            for _ in range(8):
                time.sleep(0.1)
                with contextlib.suppress(OSError):
                    slow.send(b"#")
            assert hasty.is_closed(slow, 1.0), path


def test_an_idle_connection_after_an_answer(hasty: Live) -> None:
    """Keeping a connection alive gives no more time than a new one has."""
    with hasty.connect() as kept:
        kept.send(b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200 OK" in kept.recv(65_536)
        kept.send(b"G")
        assert hasty.is_closed(kept, 2.0)


@pytest.mark.parametrize("part", ["artifacts/large.bin", "log"])
def test_an_answer_that_nobody_reads(hasty: Live, part: str) -> None:
    """A client that takes nothing of an answer for a while is cut off; one that takes it slowly gets all of it."""
    job, size = hasty.submit(), 900_000
    hasty.write(job, "run/large.bin", size)
    hasty.write(job, "log.txt", size)
    ask = f"GET /v1/jobs/{job}/{part} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    with hasty.connect() as deaf, hasty.connect() as slow:
        for one in (deaf, slow):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            one.send(ask)
        assert received(slow, pause=0.1) > size
        assert received(deaf) < size


def test_a_closing_connection_that_nobody_reads(hasty: Live) -> None:
    """An answer below the size at which writing pauses is under a clock too, also where the connection is to close."""
    job = hasty.submit()
    hasty.write(job, "run/small.bin", 60_000)
    ask = f"GET /v1/jobs/{job}/artifacts/small.bin HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_304)
        deaf.connect(("127.0.0.1", hasty.port))
        deaf.send(ask)
        time.sleep(3.5)
        assert received(deaf) < 60_000


def test_chunks_are_refused_and_not_parsed(calm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest chunks would cost the loop seconds: one piece is parsed, the rest is dropped."""
    parsed = []
    parse = h11.Connection.next_event

    def counting(connection: h11.Connection) -> object:
        event = parse(connection)
        if connection.our_role is h11.SERVER:
            parsed.append(event)
        return event

    monkeypatch.setattr(h11.Connection, "next_event", counting)
    with calm.connect() as flood:
        flood.send(b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b" 411 " in flood.recv(65_536)
        with contextlib.suppress(OSError):
            for _ in range(40):
                flood.sendall(b"1\r\nx\r\n" * 2_000)
        assert calm.is_closed(flood, 5)
    assert len(parsed) < 1_000


def test_a_refused_body_is_taken_to_an_end(calm: Live) -> None:
    """A body that nobody reads is taken up to a limit; one that ends in time leaves the connection usable."""
    head = b"POST /v1/nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
    with calm.connect() as fair:
        for _ in range(3):
            fair.sendall(head % 100_000)
            answer = b""
            while not answer.endswith(b"[]}"):
                answer += fair.recv(65_536)
            assert b" 404 " in answer
            fair.sendall(b"\n" * 100_000)
    with calm.connect() as flood:
        flood.sendall(head % 10**9)
        assert b" 413 " in flood.recv(65_536)
        with contextlib.suppress(OSError):
            for _ in range(1_000):
                flood.sendall(bytes(10_000))
        assert calm.is_closed(flood, 5)


def test_thousands_of_headers_are_refused(calm: Live) -> None:
    """Also where they come behind a whole request, in the same packet."""
    for before in (b"", b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
        with calm.connect() as many:
            many.sendall(before + b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a:\r\n" * 9_000 + b"\r\n")
            answer = b""
            with contextlib.suppress(OSError):
                while part := many.recv(65_536):
                    answer += part
        assert b" 400 " in answer


def test_pipelined_requests_are_answered_in_order(calm: Live) -> None:
    """Requests behind each other in one packet, with and without bodies, as HTTP allows."""
    get = b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    body = RECIPE.encode()
    post = b"POST /v1/recipes/validate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/yaml\r\n"
    post += b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    last = get.replace(b"Host", b"Connection: close\r\nHost")
    with calm.connect() as many:
        many.sendall((get + post) * 20 + last)
        answer = b""
        while part := many.recv(65_536):
            answer += part
    assert answer.count(b" 200 OK") == 41
    assert answer.count(b'"valid":true') == 20


def received(connection: socket.socket, pause: float = 0.0) -> int:
    """The bytes that arrive in a connection until nothing more comes."""
    connection.settimeout(1)
    taken = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(40_000):
            taken += len(part)
            time.sleep(pause)
    return taken


def test_an_address_has_few_silent_connections(calm: Live) -> None:
    """The oldest silent connection gives way to a new one, also with a refused body unfinished; a stream stays."""
    with httpx.Client(base_url=calm.http.base_url, timeout=10) as stream:
        job = calm.submit()
        with stream.stream("GET", f"/v1/jobs/{job}/events") as events:
            lines = events.iter_lines()
            assert next(lines).startswith("event:")
            silent = [calm.connect() for _ in range(60)]
            for one in silent[::2]:
                with contextlib.suppress(OSError):
                    one.send(UNFINISHED)  # its host is not the service's
            assert all(calm.is_closed(one, 10) for one in silent[:50])
            assert calm.http.get("/v1/jobs").status_code == 200
            assert calm.http.post(f"/v1/jobs/{job}/cancel").status_code == 200
            assert any("cancelled" in line for line in lines)
            for one in silent:
                one.close()


def test_a_stream_outlives_the_time_limits(hasty: Live) -> None:
    """A stream is an answer under way, however little happens."""
    job = hasty.submit()
    with hasty.http.stream("GET", f"/v1/jobs/{job}/events") as events:
        time.sleep(1.5)
        with httpx.Client(base_url=hasty.http.base_url) as other:
            other.post(f"/v1/jobs/{job}/cancel")
        assert any("cancelled" in line for line in events.iter_lines())


def test_streams_of_one_user_leave_room_for_others(calm: Live) -> None:
    """More event streams than a user may have are refused with a remedy; health, lists and metrics are answered."""
    job = calm.submit()
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(httpx.Client(base_url=calm.http.base_url, timeout=10)) for _ in range(6)]
        answers = [held.enter_context(one.stream("GET", f"/v1/jobs/{job}/events")) for one in clients]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429, 429]
        assert answers[-1].headers["Retry-After"] == "5"
        for path in ("/v1/health", "/v1/metrics", "/v1/jobs"):
            assert calm.http.get(path).status_code == 200
        assert calm.http.post(f"/v1/jobs/{job}/cancel").status_code == 200
    for _ in range(100):  # until the server has seen the ends of the streams
        if calm.http.get(f"/v1/jobs/{job}/events").status_code == 200:
            return
        time.sleep(0.1)
    pytest.fail("the places of ended streams stay taken")


def test_connections_leave_files_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system allows few open files, there are fewer connections, with room for those accepted in one go."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1_024))
    assert most_connections() + BACKLOG + 256 == 1_024
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 1 << 20))
    assert most_connections() == 4_096
    assert asked == [(1_024, 1_024), (4_096 + BACKLOG + 256, 1 << 20)]


def test_the_register_counts_by_address() -> None:
    """Of many connections the longest silent one goes; a trusted proxy may hold more, and a busy one stays."""

    said: list[str] = []
    register_of: dict[object, Register] = {}

    class Fake:
        def __init__(self, address: str) -> None:
            self.address, self.transport, self.loop, self.aborted = address, self, self, False

        def call_later(self, _: float, report: Callable[[], None]) -> None:
            said.append("later")

        def abort(self) -> None:
            self.aborted = True
            register_of[self].lost(self)  # type: ignore[arg-type]

    def held(register: Register, addresses: list[str]) -> list[Fake]:
        made = [Fake(address) for address in addresses]
        for one in made:
            register_of[one] = register
            register.opened(one)  # type: ignore[arg-type]
            if not one.aborted:
                register.waits(one)  # type: ignore[arg-type]
        return made

    register = Register(most_waiting=2, most=100, trusted=("10.0.0.0/8",))
    assert [one.aborted for one in held(register, ["1.1.1.1"] * 4)] == [True, True, False, False]
    assert not any(one.aborted for one in held(register, ["10.1.2.3"] * 9))
    assert said == ["later"], "one line of the log tells of both"
    crowded = Register(most_waiting=9, most=100, most_of_address=2, trusted=("10.0.0.0/8",))
    busy = held(crowded, ["1.1.1.1", "1.1.1.1"])
    for one in busy:
        crowded.works(one)  # type: ignore[arg-type]
    assert held(crowded, ["1.1.1.1"])[0].aborted, "an address has requests under way on all that it may have"
    assert not any(one.aborted for one in held(crowded, ["2.2.2.2", "10.0.0.1", "10.0.0.1", "10.0.0.1"]))
    full = Register(most_waiting=99, most=4)
    first = held(full, ["1.1.1.1", "2.2.2.2", "2.2.2.2", "3.3.3.3"])
    held(full, ["4.4.4.4"])
    assert [one.aborted for one in first] == [False, True, False, False], "the oldest of the address with the most"
    for one in first:
        full.works(one)  # type: ignore[arg-type]
    held(full, ["5.5.5.5"])
    assert not any(one.aborted for one in (first[0], first[2], first[3])), "requests under way stay"


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
    assert rate.wait("a") == 0
    assert rate.wait("a") > 0
    rate.give_back("a")
    assert rate.wait("a") == 0
    rate.give_back("nobody")
