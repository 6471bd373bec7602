"""Connections of one client: their number is limited, and everybody else is served."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable

import httpx2 as httpx
import pytest
from helpers.live_server import UNFINISHED, Live

from llmprune.service.api.access.rate_limit import ConcurrencyLimit, RateLimit, network_of
from llmprune.service.connections import BACKLOG, Register, is_among, max_connections


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
    assert max_connections() + BACKLOG + 256 == 1_024
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 1 << 20))
    assert max_connections() == 4_096
    assert asked == [(1_024, 1_024), (4_096 + BACKLOG + 256, 1 << 20)]


def test_the_register_counts_by_address() -> None:
    """Of many connections the longest silent one is closed, and no busy one; a trusted proxy may hold more."""

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

    register = Register(max_waiting=2, max_connections=100, trusted=("10.0.0.0/8",))
    assert [one.aborted for one in held(register, ["1.1.1.1"] * 4)] == [True, True, False, False]
    assert not any(one.aborted for one in held(register, ["10.1.2.3"] * 9))
    assert said == ["later"], "one line of the log tells of both"
    crowded = Register(max_waiting=9, max_connections=100, max_of_address=2, trusted=("10.0.0.0/8",))
    busy = held(crowded, ["1.1.1.1", "1.1.1.1"])
    for one in busy:
        crowded.works(one)  # type: ignore[arg-type]
    assert held(crowded, ["1.1.1.1"])[0].aborted, "an address has requests under way on all that it may have"
    assert not any(one.aborted for one in held(crowded, ["2.2.2.2", "10.0.0.1", "10.0.0.1", "10.0.0.1"]))
    full = Register(max_waiting=99, max_connections=4)
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
    flying = ConcurrencyLimit()
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
