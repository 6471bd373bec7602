"""Services for tests: settings with a fake run, a service in this process, and one in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient

from helpers.postgresql import server
from llmprune.service.api.app import create_app
from llmprune.service.client.sync.client import Client
from llmprune.service.database.database import Database, DatabaseUnavailable
from llmprune.service.jobs.job import ENDED
from llmprune.service.planner.planner import Planner
from llmprune.service.settings import Settings
from llmprune.service.supervisor.supervisor import Supervisor

FAKE = (sys.executable, str(Path(__file__).with_name("fake_run.py")))
RECIPE = "model: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 1}\n"
YAML = {"Content-Type": "application/yaml"}
BASE = "http://127.0.0.1:8321"
PROXY, OTHER = "10.0.0.1", "10.9.9.9"  # addresses of a trusted proxy and of a client


def settings_in(folder: Path, **changes: Any) -> Settings:
    """Return settings of a service in a folder; its jobs are fake runs.

    With SERVICE_DATABASE=postgresql in the environment the job table is in PostgreSQL.
    """
    if os.environ.get("SERVICE_DATABASE") == "postgresql":
        changes = {"database_url": server().new_database()} | changes
    return Settings(**{"data_dir": folder / "data", "command": FAKE, "grace": 0.5} | changes)


def read_only(patch: pytest.MonkeyPatch, database: Database) -> None:
    """Make every database of this kind refuse to write."""

    def refuse(self: Database) -> None:
        reason = "attempt to write a readonly database"
        raise DatabaseUnavailable(f"the job table cannot be written: {reason}", reason=reason)

    patch.setattr(type(database), "write", refuse)


def from_address(harness: ServiceHarness, address: str) -> TestClient:
    """Return a client at an address."""
    return TestClient(harness.app, base_url=BASE, client=(address, 50_000), follow_redirects=False)


def recipe(**behaviour: object) -> str:
    """Return a recipe that tells the fake run how to behave; see ``fake_run.py``."""
    return "".join(f"# fake {key} {value}\n" for key, value in behaviour.items()) + RECIPE


class ServiceHarness:
    """A service in this process; tests call the rounds of its supervisor."""

    def __init__(self, folder: Path, planner: Planner | None = None, **changes: Any) -> None:
        self.settings = settings_in(folder, **changes)
        self.app = create_app(self.settings, planner)
        self.http = TestClient(self.app, base_url=BASE, raise_server_exceptions=False)
        self.service = self.app.state.service
        self.supervisor = Supervisor(self.settings)

    def submit(self, text: str = RECIPE, headers: dict[str, str] | None = None, **params: Any) -> dict[str, Any]:
        """Submit a recipe and return its job."""
        answer = self.http.post("/v1/jobs", content=text, params=params, headers=YAML | (headers or {}))
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def job(self, job: str) -> dict[str, Any]:
        """Return the job as it is now; waits where the rate limit refuses the request."""
        while (answer := self.http.get(f"/v1/jobs/{job}")).status_code == 429:
            time.sleep(0.2)
        found: dict[str, Any] = answer.json()
        return found

    def until(
        self, job: str, reached: Callable[[dict[str, Any]], bool], seconds: float = 20.0, *, pause: float = 0.02
    ) -> dict[str, Any]:
        """Run rounds, ``pause`` seconds apart, until the job satisfies a condition, and return it."""
        deadline = time.monotonic() + seconds
        while not reached(found := self.job(job)):
            assert time.monotonic() < deadline, found
            self.supervisor.round()
            time.sleep(pause)
        return found

    def until_ended(self, job: str) -> dict[str, Any]:
        """Run rounds until the job has ended, and return it."""
        return self.until(job, lambda found: found["state"] in ENDED)

    def run_folder(self, job: str) -> Path:
        """Return the run folder of a job."""
        return self.settings.run_folder(job)

    def forward(self, request: httpx.Request) -> httpx.Response:
        """Answer a request of a client, which arrives as one from a socket."""
        url, headers = str(request.url), request.headers
        answer = self.http.request(request.method, url, headers=headers, content=request.read())
        return httpx.Response(answer.status_code, headers=answer.headers, content=iter([answer.content]))

    def client(self, answer: Callable[[httpx.Request], httpx.Response] | None = None, **options: Any) -> Client:
        """Return a Python client of the service. ``answer``: stands between the two."""
        return Client(BASE, transport=httpx.MockTransport(answer or self.forward), **options)

    @contextlib.contextmanager
    def supervised(self) -> Iterator[None]:
        """Run rounds of the supervisor while the block lasts."""
        over = threading.Event()

        def supervise() -> None:
            while not over.wait(0.02):
                self.supervisor.round()

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


_SERVE = """
import sys
from llmprune.service.server import serve
from llmprune.service.settings import Settings
serve(Settings.model_validate_json(sys.argv[1]))
"""


def answer_requests(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """Answer every HTTP request of this process's clients without a network."""
    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: transport.handle_request(request))


def free_port() -> int:
    """Return a port on which no program listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start(settings: Settings) -> subprocess.Popen[bytes]:
    """Start ``llmprune serve`` with these settings and wait until it answers."""
    command = [sys.executable, "-c", _SERVE, settings.model_dump_json()]
    log = (settings.data_dir.parent / "serve.log").open("ab")
    process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
    log.close()
    deadline = time.monotonic() + 120  # a busy machine is slow
    while process.poll() is None and not answers(settings.port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, (settings.data_dir.parent / "serve.log").read_text()
    return process


def answers(port: int) -> bool:
    """Return whether a program listens on a port."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def served(folder: Path, **changes: Any) -> Iterator[tuple[Client, Settings]]:
    """Run a service in processes of its own, and stop it at the end."""
    settings = settings_in(folder, port=free_port(), **changes)
    process = start(settings)
    try:
        with Client(f"http://127.0.0.1:{settings.port}") as client:
            yield client, settings
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def supervisor_of(server: int) -> int | None:
    """Return the process id of a service's supervisor."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(server).children():
            if "llmprune.service.supervisor" in child.cmdline():
                return int(child.pid)
    return None


def kill(pid: int | None) -> None:
    """Send SIGKILL to a process, if there is one."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
