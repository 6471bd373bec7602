"""Start of ``llmprune serve``: what it cannot use is reported with the remedy before anything runs."""

from __future__ import annotations

import logging
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from helpers.commands import command
from helpers.service import settings_in

from llmprune.common.errors import RecipeError
from llmprune.service import server
from llmprune.service.data_folder import locked
from llmprune.service.database.database import DatabaseUnavailable
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.listening import listening
from llmprune.service.server import open_tokens
from llmprune.service.settings import Settings
from llmprune.service.supervisor import devices

LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-0a0a0a0a-d33d-2b2c-524d-000000000000)
"""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which a program listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No supervisor may be started: nothing starts a process of this interpreter."""
    run = subprocess.Popen

    def popen(command: Sequence[str], *arguments: Any, **settings: Any) -> subprocess.Popen[Any]:
        assert command[0] != sys.executable, "started a supervisor"
        return run(command, *arguments, **settings)

    monkeypatch.setattr(subprocess, "Popen", popen)


@pytest.mark.usefixtures("no_jobs")
def test_a_busy_port_is_an_error_at_once(tmp_path: Path, taken: int) -> None:
    """A busy port exits with 2 and a message with port and remedy, and nothing is started."""
    outcome = command("serve", "--port", str(taken), "--data-dir", tmp_path / "data", "--gpus", "none")
    assert outcome.code == 2
    assert outcome.err == (
        f"llmprune: --port {taken}: another program listens on 127.0.0.1:{taken} already; "
        "stop it, or give another --port\n"
    )


@pytest.mark.parametrize(
    ("host", "said"), [("192.0.2.1", "cannot listen there"), ("bad..name", "give an address of this machine")]
)
def test_a_host_that_is_not_this_machine(host: str, said: str) -> None:
    """An address of another machine and an invalid name are refused."""
    with pytest.raises(RecipeError, match=said), listening(host, 8321, backlog=1):
        pass


def test_every_address_of_a_host_is_listened_on() -> None:
    """A host is served on all of its addresses, and the sockets are closed at the end."""
    with listening("127.0.0.1", 0, backlog=1) as sockets:
        assert [(listener.family, listener.proto) for listener in sockets] == [(socket.AF_INET, socket.IPPROTO_TCP)]
        port = sockets[0].getsockname()[1]
        with socket.socket() as caller:
            assert caller.connect_ex(("127.0.0.1", port)) == 0
    assert all(listener.fileno() == -1 for listener in sockets)


class FakeSupervisor:
    """A supervisor without a process."""

    def __init__(self, settings: Settings) -> None:
        self.stopped: list[bool] = []

    def wake(self) -> None:
        """Do nothing."""

    def stop(self, keep_jobs: bool) -> None:
        """Record whether the jobs run on."""
        self.stopped.append(keep_jobs)


def test_an_app_that_cannot_be_made_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error itself is raised, not one of the clean-up, and the supervisor is stopped."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # it would replace pytest's handlers
    settings = settings_in(tmp_path, port=0)
    supervisor = FakeSupervisor(settings)

    def make_app(settings: Settings, *, wake: Callable[[], None]) -> FastAPI:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        server.serve(settings, start_supervisor=lambda _: supervisor, make_app=make_app)
    assert supervisor.stopped == [False]


@pytest.mark.parametrize("verb", [("serve", "--gpus", "none"), ("token", "list")])
@pytest.mark.parametrize(
    ("content", "said"), [(None, "--data-dir"), (b"no table at all, just text" * 99, "cannot be used")]
)
@pytest.mark.usefixtures("no_jobs")
def test_a_data_folder_that_cannot_be_used(
    tmp_path: Path, verb: tuple[str, ...], content: bytes | None, said: str
) -> None:
    """A file in place of the data folder, or a damaged job table, exits with 2 and the remedy."""
    folder = tmp_path / "data"
    if content is None:
        folder.touch()
    else:
        folder.mkdir()
        (folder / "service.sqlite3").write_bytes(content)
    outcome = command(*verb, "--data-dir", folder)
    assert (outcome.code, said in outcome.err, len(outcome.err.splitlines())) == (2, True, 1), outcome.err


@pytest.mark.parametrize(
    "verb", [("serve", "--gpus", "none"), ("token", "create", "--name", "new"), ("user", "disable", "ann")]
)
@pytest.mark.usefixtures("no_jobs")
def test_a_job_table_that_may_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    """It is refused with the remedy before a service starts, and by the commands that write."""
    open_tokens(settings_in(tmp_path)).create("ann", "admin")
    reason = "attempt to write a readonly database"

    def write(_: SqliteDatabase) -> None:
        raise DatabaseUnavailable(f"the job table cannot be written: {reason}", reason=reason)

    monkeypatch.setattr(SqliteDatabase, "write", write)
    outcome = command(*verb, "--data-dir", settings_in(tmp_path).data_dir)
    assert (outcome.code, "check the permissions of the file" in outcome.err) == (2, True), outcome.err


@pytest.mark.parametrize("verb", [("token", "list"), ("token", "revoke", "--name", "ann"), ("user", "list")])
def test_a_mistyped_data_folder_is_not_made(tmp_path: Path, verb: tuple[str, ...]) -> None:
    """Commands about what a service has name the folder that has none."""
    outcome = command(*verb, "--data-dir", tmp_path / "typo")
    assert (outcome.code, "has no job table; give the --data-dir" in outcome.err) == (2, True), outcome.err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("verb", [("serve", "--gpus", "none"), ("token", "list")])
@pytest.mark.usefixtures("no_jobs")
def test_a_table_that_a_service_uses_is_left_as_it_is(tmp_path: Path, verb: tuple[str, ...]) -> None:
    """The table of a running service of an earlier version is not migrated until that service has stopped."""
    settings = settings_in(tmp_path)
    settings.prepare()
    table = sqlite3.connect(settings.database)
    first = files("llmprune.service.database").joinpath("migrations", "0001_jobs.sql").read_text(encoding="utf-8")
    table.executescript(f"{first}; PRAGMA user_version = 1")
    with locked(settings.data_dir):
        outcome = command(*verb, "--data-dir", settings.data_dir)
        assert (outcome.code, "another llmprune serve uses" in outcome.err) == (2, True), outcome.err
        assert table.execute("PRAGMA user_version").fetchone() == (1,)
    assert command("token", "list", "--data-dir", settings.data_dir).code == 0
    assert table.execute("PRAGMA user_version").fetchone() > (5,)


def driver(monkeypatch: pytest.MonkeyPatch, listed: str | None, torch: int = 0) -> list[list[str]]:
    """Have nvidia-smi list GPUs, or be missing, and torch see ``torch`` GPUs; return the commands that are run."""
    run: list[list[str]] = []

    def answer(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        run.append(arguments)
        if arguments[0] == "nvidia-smi" and listed is None:
            raise FileNotFoundError(arguments[0])
        return subprocess.CompletedProcess(arguments, 0, listed if arguments[0] == "nvidia-smi" else f"{torch}\n")

    monkeypatch.setattr(devices.subprocess, "run", answer)
    return run


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("0,7", "no GPU 7 (it has: 0, 1); name some of those, or none"),
        ("GPU-ffff", "no GPU GPU-ffff"),
        ("0,0", "names '0' twice"),
        ("0,,1", "has an empty name"),
        ("cuda:0", "no GPU cuda:0"),
        ("-1", "no GPU -1"),
    ],
)
@pytest.mark.usefixtures("no_jobs")
def test_gpus_that_are_not_there_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, message: str
) -> None:
    """The message names the missing GPUs and the ones that exist."""
    driver(monkeypatch, LISTED)
    outcome = command("serve", f"--gpus={gpus}", "--data-dir", tmp_path / "data")
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_gpus_by_number_uuid_and_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of CUDA_VISIBLE_DEVICES is accepted; without the option all GPUs are found by number."""
    driver(monkeypatch, LISTED)
    for wish in ("0, 1", "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", "GPU-5d5b", "MIG-c6d4f1ef"):
        assert devices.choose_gpus(wish) == tuple(name.strip() for name in wish.split(","))
    assert devices.choose_gpus("none") == ()
    assert devices.find_gpus() == ("0", "1")


def test_gpus_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-smi torch finds the GPUs, in a process of its own."""
    run = driver(monkeypatch, None, torch=2)
    assert devices.choose_gpus("1") == ("1",)
    assert run[-1][0] == sys.executable
    driver(monkeypatch, None)
    with pytest.raises(RecipeError, match=r"no GPU 0 \(it has: none\)"):
        devices.choose_gpus("0")
    assert devices.find_gpus() == ()
