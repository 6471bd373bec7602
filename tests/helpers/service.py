"""A service to test: its settings with a fake run, one in this process, and one in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from llmprune.service.api.app import create_app
from llmprune.service.cli.client import ENDED, Client
from llmprune.service.planner.planner import Planner
from llmprune.service.settings import Settings
from llmprune.service.supervisor.supervisor import Supervisor

FAKE = (sys.executable, str(Path(__file__).with_name("fake_run.py")))
RECIPE = "model: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 1}\n"
YAML = {"Content-Type": "application/yaml"}
BASE = "http://127.0.0.1:8321"


def settings_in(folder: Path, **changes: Any) -> Settings:
    """Settings on a folder whose jobs are fakes."""
    return Settings(**{"data_dir": folder / "data", "command": FAKE, "grace": 0.5} | changes)


def recipe(**wishes: object) -> str:
    """A recipe with wishes for the fake run."""
    return "".join(f"# fake {key} {value}\n" for key, value in wishes.items()) + RECIPE


class Bench:
    """A service in this process, whose supervisor goes round when it is told to."""

    def __init__(self, folder: Path, planner: Planner | None = None, **changes: Any) -> None:
        self.settings = settings_in(folder, **changes)
        self.app = create_app(self.settings, planner)
        self.http = TestClient(self.app, base_url=BASE, raise_server_exceptions=False)
        self.service = self.app.state.service
        self.supervisor = Supervisor(self.settings)

    def submit(self, text: str = RECIPE, headers: dict[str, str] | None = None, **params: Any) -> dict[str, Any]:
        """The job that a recipe becomes."""
        answer = self.http.post("/v1/jobs", content=text, params=params, headers=YAML | (headers or {}))
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def job(self, job: str) -> dict[str, Any]:
        """The job as it is now; where that was asked too often, a little later."""
        while (answer := self.http.get(f"/v1/jobs/{job}")).status_code == 429:
            time.sleep(0.2)
        found: dict[str, Any] = answer.json()
        return found

    def until(self, job: str, reached: Callable[[dict[str, Any]], bool], seconds: float = 20.0) -> dict[str, Any]:
        """Go round until the job is as wanted."""
        deadline = time.monotonic() + seconds
        while not reached(found := self.job(job)):
            assert time.monotonic() < deadline, found
            self.supervisor.round()
            time.sleep(0.02)
        return found

    def until_ended(self, job: str) -> dict[str, Any]:
        """Go round until the job has ended."""
        return self.until(job, lambda found: found["state"] in ENDED)

    def run_folder(self, job: str) -> Path:
        """Where the job's products lie."""
        return self.settings.run_folder(job)


_SERVE = """
import sys
from llmprune.service.server import serve
from llmprune.service.settings import Settings
serve(Settings.model_validate_json(sys.argv[1]))
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start(settings: Settings) -> subprocess.Popen[bytes]:
    """``llmprune serve`` with these settings, once it answers."""
    command = [sys.executable, "-c", _SERVE, settings.model_dump_json()]
    log = (settings.data_dir.parent / "serve.log").open("ab")
    process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
    log.close()
    deadline = time.monotonic() + 120  # a busy machine takes its time
    while process.poll() is None and not answers(settings.port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, (settings.data_dir.parent / "serve.log").read_text()
    return process


def answers(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def served(folder: Path, **changes: Any) -> Iterator[tuple[Client, Settings]]:
    """A service in processes of its own, stopped in order at the end."""
    settings = settings_in(folder, port=free_port(), **changes)
    process = start(settings)
    try:
        with Client(f"http://127.0.0.1:{settings.port}") as client:
            yield client, settings
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def supervisor_of(server: int) -> int | None:
    """The process id of a service's supervisor."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(server).children():
            if "llmprune.service.supervisor.supervisor" in child.cmdline():
                return int(child.pid)
    return None


def kill(pid: int | None) -> None:
    """SIGKILL, where there is such a process."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
