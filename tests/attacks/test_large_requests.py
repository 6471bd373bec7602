"""Requests with too many headers, chunks or requests in a row: refused or answered in order."""

from __future__ import annotations

import contextlib

import h11
import pytest
from helpers.live_server import Live
from helpers.service import RECIPE


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


def test_uploads_may_be_large_and_others_may_not(calm: Live) -> None:
    """An upload's body arrives whole at its route, in little time of the loop; what follows it is parsed as ever."""
    size = 3_000_000
    for line, status in (
        (b"POST /models/upload", b" 415 "),
        (b"PUT /v1/models/uploads/%s/files/a" % (b"0" * 12), b" 404 "),
    ):
        with calm.connect() as upload:
            upload.sendall(line + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % size)
            upload.sendall(bytes(size) + b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            answer = b""
            while part := upload.recv(65_536):
                answer += part
        assert status in answer
    with calm.connect() as other, contextlib.suppress(OSError):
        other.sendall(b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % size)
        other.sendall(bytes(size))
        assert b" 413 " in other.recv(65_536)


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
