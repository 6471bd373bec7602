"""``llmprune serve``: the HTTP process, and beside it the supervisor, started again whenever it dies."""

from __future__ import annotations

import fcntl
import logging
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.common.errors import OutputError, RecipeError
from llmprune.service.jobs.database import Database
from llmprune.service.jobs.tokens import Tokens
from llmprune.service.listening import listening
from llmprune.service.logs import kept, log_with_time
from llmprune.service.settings import Settings, is_loopback

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_SUPERVISOR = (sys.executable, "-m", "llmprune.service.supervisor.supervisor")
_PAUSE = 0.5  # seconds before it is started again
_HEADERS = 48 * 1024  # bytes of a request's line and headers: a recipe's overrides are in the line


class SupervisorProcess:
    """Keeps one supervisor running. It lives no longer than this process: its input closes with it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.model_dump_json().encode() + b"\n"
        self._stopping = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Wake it: there is something to do."""
        self._say(b"\n")

    def stop(self, keep_jobs: bool) -> None:
        """End it, with its jobs or without."""
        self._stopping.set()
        if not keep_jobs:
            self._say(b"stop\n")
        assert self._process.stdin is not None, "piped"
        self._process.stdin.close()
        self._process.wait()

    def _say(self, word: bytes) -> None:
        try:
            assert self._process.stdin is not None, "piped"
            self._process.stdin.write(word)
            self._process.stdin.flush()
        except (OSError, ValueError):
            return  # it has died: the next one looks at the table anyway

    def _keep(self) -> None:
        while True:
            self._process.wait()
            if self._stopping.wait(_PAUSE):
                return
            logger.warning("the supervisor ended (%s); starting it again", self._process.returncode)
            self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C is for this process, which then stops it in order
        process = subprocess.Popen(_SUPERVISOR, stdin=subprocess.PIPE, start_new_session=True)
        assert process.stdin is not None, "piped"
        process.stdin.write(self._settings)
        process.stdin.flush()
        return process


def serve(settings: Settings) -> None:
    """Answer until SIGTERM or Ctrl-C. Raises OutputError and RecipeError where it must not start."""
    from llmprune.service.connections import BACKLOG

    with _usable(settings):
        settings.prepare()
    with _only_one(settings.data_dir):
        with _usable(settings):
            database = Database(settings.database)
            database.migrate()
        require_token(settings, Tokens(database))
        with listening(settings.host, settings.port, backlog=BACKLOG) as sockets:
            log_with_time()
            keeper = SupervisorProcess(settings)
            try:
                _answer(settings, keeper, sockets=sockets)
            finally:
                keeper.stop(settings.keep_jobs)


def open_table(settings: Settings) -> Tokens:
    """Return the tokens of a data folder, beside a service that may run on it.

    Only a table that no service uses is made or brought up to date. Raises OutputError where it cannot be used.
    """
    with _usable(settings):
        settings.prepare()
        database = Database(settings.database)
        if not database.is_current():
            with _only_one(settings.data_dir):
                database.migrate()
    return Tokens(database)


@contextmanager
def _usable(settings: Settings) -> Iterator[None]:
    """Raise OutputError where the data folder or its job table cannot be used."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"the data folder {settings.data_dir} cannot be made: {error}; give another") from error
    except sqlite3.Error as error:
        raise OutputError(
            f"the job table {settings.database} cannot be used: {error}; give another --data-dir, or the file as it "
            "was last saved"
        ) from error


def _answer(settings: Settings, keeper: SupervisorProcess, *, sockets: list[socket.socket]) -> None:
    """Answer requests until a signal."""
    import uvicorn

    from llmprune.service.api.app import create_app

    app = create_app(settings, nudge=keeper.nudge)
    try:
        app.openapi()  # kept by the app: made at the first request, it would hold the event loop
        print(f"llmprune serves http://{settings.host}:{settings.port}", file=sys.stderr, flush=True)
        with _stopped_by_signals(), kept(settings.data_dir):
            uvicorn.Server(_configuration(app, settings)).run(sockets)
    finally:
        app.state.service.planner.close()


def _configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    import uvicorn

    from llmprune.service.connections import BACKLOG, LimitedProtocol, Register, most_connections

    register = Register(trusted=settings.trusted_proxies, most=most_connections())
    return uvicorn.Config(
        app, host=settings.host, port=settings.port, http=partial(LimitedProtocol, register),  # type: ignore[arg-type]
        backlog=BACKLOG, ws="none", h11_max_incomplete_event_size=_HEADERS, log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=10, timeout_graceful_shutdown=3,
    )  # fmt: skip


def require_token(settings: Settings, tokens: Tokens) -> None:
    """Beyond this machine only with a token. Raises RecipeError."""
    if not is_loopback(settings.host) and not tokens.everyone():
        raise RecipeError(
            f"--host {settings.host}: others can reach this, so a token is needed first; make one with "
            f"llmprune token create --name NAME --role admin --data-dir {settings.data_dir}"
        )


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """uvicorn ends on SIGTERM and Ctrl-C, then raises them again: that must not cut off the orderly end."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """A lock on the data folder: two services on one would both serve it. Raises OutputError."""
    try:
        lock = (folder / "serve.lock").open("a")
    except OSError as error:
        raise OutputError(f"the data folder {folder} cannot be written: {error}; give another --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another llmprune serve uses {folder}; stop it, or give another --data-dir") from None
        yield
