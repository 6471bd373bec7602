"""``llmprune serve``: the HTTP server, and the supervisor as a child process that is restarted whenever it dies."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmprune.common.errors import OutputError, RecipeError
from llmprune.service.data_folder import locked, usable
from llmprune.service.database.open_database import is_absent, open_database
from llmprune.service.listening import listening
from llmprune.service.logs import audit_command, kept, log_with_time
from llmprune.service.settings import Settings, is_loopback
from llmprune.service.upgrade import bring_up_to_date
from llmprune.service.users.tokens import Tokens
from llmprune.service.users.users import Users

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_SUPERVISOR = (sys.executable, "-m", "llmprune.service.supervisor")
_RESTART_AFTER = 0.5  # seconds
_FIRST = "first"  # name of the first token
_MAX_HEADERS = 48 * 1024  # bytes of a request's line and headers: the line holds a recipe's overrides


class SupervisorProcess:
    """Keeps one supervisor running. The supervisor ends with this process, because its standard input closes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.model_dump_json().encode() + b"\n"
        self._stopping = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._restart, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Wake the supervisor: the job table has changed."""
        self._send(b"\n")

    def stop(self, keep_jobs: bool) -> None:
        """End the supervisor, and with ``keep_jobs`` false also the jobs."""
        self._stopping.set()
        if not keep_jobs:
            self._send(b"stop\n")
        assert self._process.stdin is not None, "piped"
        self._process.stdin.close()
        self._process.wait()

    def _send(self, line: bytes) -> None:
        try:
            assert self._process.stdin is not None, "piped"
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except (OSError, ValueError):
            return  # it has died, and the next one reads the job table anyway

    def _restart(self) -> None:
        while True:
            self._process.wait()
            if self._stopping.wait(_RESTART_AFTER):
                return
            logger.warning("the supervisor ended (%s); starting it again", self._process.returncode)
            self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # a new session: Ctrl-C reaches only this process, which then stops the supervisor
        process = subprocess.Popen(_SUPERVISOR, stdin=subprocess.PIPE, start_new_session=True)
        assert process.stdin is not None, "piped"
        process.stdin.write(self._settings)
        process.stdin.flush()
        return process


class Supervising(Protocol):
    """The supervisor of a service, as the server uses it."""

    def wake(self) -> None:
        """Wake the supervisor."""

    def stop(self, keep_jobs: bool) -> None:
        """End the supervisor, with its jobs or without."""


class MakeApp(Protocol):
    """Maker of the application that answers requests."""

    def __call__(self, settings: Settings, *, wake: Callable[[], None]) -> FastAPI:
        """Make the app; ``wake`` wakes the supervisor."""


def _make_app(settings: Settings, *, wake: Callable[[], None]) -> FastAPI:
    from llmprune.service.api.app import create_app

    return create_app(settings, wake=wake)


def serve(
    settings: Settings,
    *,
    start_supervisor: Callable[[Settings], Supervising] = SupervisorProcess,
    make_app: MakeApp = _make_app,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises OutputError and RecipeError where the service cannot start."""
    from llmprune.service.connections import BACKLOG

    with usable(settings):
        settings.prepare()
    with ExitStack() as held:
        held.enter_context(locked(settings.data_dir))
        with usable(settings):
            database = open_database(settings)
            held.enter_context(database.only_service())
            bring_up_to_date(database, settings)
            with database.write() as connection:  # a table that may only be read is refused now, not job by job
                connection.execute("DELETE FROM jobs WHERE 1 = 0")
        require_token(settings, Tokens(database))
        with listening(settings.host, settings.port, backlog=BACKLOG) as sockets:
            log_with_time()
            supervisor = start_supervisor(settings)
            try:
                _run_http(make_app(settings, wake=supervisor.wake), settings, sockets=sockets)
            finally:
                supervisor.stop(settings.keep_jobs)


def open_tokens(settings: Settings, *, make: bool = True) -> Tokens:
    """Return the tokens of a data folder, whether or not a service runs on it.

    The job table is made or migrated only while no service uses it. Raises OutputError where it cannot be used, and,
    without ``make``, where there is none.
    """
    with usable(settings):
        database = open_database(settings)
        if not make and is_absent(database):
            raise OutputError(f"{database.place} has no job table; give the --data-dir or --database of a service")
        settings.prepare()
        if not database.is_current():
            with locked(settings.data_dir), database.only_service():
                database.migrate()
    return Tokens(database)


def write_first_token(settings: Settings, file: Path) -> None:
    """Make an admin's token and write it where only this user reads it, if there is no user yet.

    For containers, in which nobody can run ``token create`` before the service starts. Raises OutputError where the
    file cannot be written; then no token is made.
    """
    tokens = open_tokens(settings)
    if Users(tokens.database).exist():
        return
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as opened:
            os.fchmod(opened.fileno(), 0o600)
            opened.write(tokens.create(_FIRST, "admin") + "\n")
    except OSError as error:
        raise OutputError(f"--first-token-file {file}: it cannot be written: {error}; give another") from error
    audit_command(settings.data_dir, action="token create", token=_FIRST, role="admin")
    logger.warning("the token of the admin %r is in %s; delete the file when you have it", _FIRST, file)


def _run_http(app: FastAPI, settings: Settings, *, sockets: list[socket.socket]) -> None:
    """Answer requests until SIGTERM or Ctrl-C."""
    import uvicorn

    try:
        app.openapi()  # cached by the app; building it at the first request would block the event loop
        print(f"llmprune serves http://{settings.host}:{settings.port}", file=sys.stderr, flush=True)
        with _stopped_by_signals(), kept(settings.data_dir):
            uvicorn.Server(_configuration(app, settings)).run(sockets)
    finally:
        app.state.service.planner.close()


def _configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    import uvicorn

    from llmprune.service.connections import BACKLOG, LimitedProtocol, Register, max_connections

    register = Register(trusted=settings.trusted_proxies, max_connections=max_connections())
    return uvicorn.Config(
        app, host=settings.host, port=settings.port, http=partial(LimitedProtocol, register),  # type: ignore[arg-type]
        backlog=BACKLOG, ws="none", h11_max_incomplete_event_size=_MAX_HEADERS, log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=10, timeout_graceful_shutdown=3,
    )  # fmt: skip


def require_token(settings: Settings, tokens: Tokens) -> None:
    """Raise RecipeError where other machines can reach the service and nobody could sign in."""
    if not is_loopback(settings.host) and settings.oidc is None and not tokens.records():
        raise RecipeError(
            f"--host {settings.host}: other machines can reach this address, so a token is needed first; make one with "
            f"llmprune token create --name NAME --role admin --data-dir {settings.data_dir}"
        )


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ignore the signals that uvicorn raises again after it has ended on them, so that the shutdown is complete."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
