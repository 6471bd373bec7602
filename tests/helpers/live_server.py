"""Server in a thread of this process, with short or long time limits."""

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
import uvicorn

from helpers.service import RECIPE, YAML, settings_in
from llmprune.service.api.app import create_app
from llmprune.service.connections import LimitedProtocol, Register, Timeouts

CALM = Timeouts(headers=60, body=60, reading=60)


HURRY = Timeouts(headers=0.5, body=0.5, reading=0.8)


UNFINISHED = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/yaml\r\nContent-Length: 9\r\n\r\n"


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
def running(folder: Path, timeouts: Timeouts) -> Iterator[Live]:
    """A server on which an address may have 4 silent connections, behind a line that holds little."""
    register = Register(timeouts=timeouts, max_waiting=4, max_connections=30)
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


def received(connection: socket.socket, pause: float = 0.0) -> int:
    """The bytes that arrive in a connection until nothing more comes."""
    connection.settimeout(1)
    taken = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(40_000):
            taken += len(part)
            time.sleep(pause)
    return taken
