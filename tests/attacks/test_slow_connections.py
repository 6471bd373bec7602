"""Connections that send or read slowly: each is closed in its time, and everybody else is served."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from helpers.live_server import UNFINISHED, Live, received
from helpers.service import RECIPE, YAML, served


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


def test_an_upload_may_be_slow_but_not_silent(hasty: Live) -> None:
    """Its limit is the time without a byte: one that comes byte by byte goes on, and ends once nothing comes."""
    with hasty.connect() as slow:
        slow.send(
            b"POST /models/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        for _ in range(30):
            time.sleep(0.05)
            slow.send(b"x")
        assert not hasty.is_closed(slow, 0.05)
        assert hasty.is_closed(slow, 5.0)


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
