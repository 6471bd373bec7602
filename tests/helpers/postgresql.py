"""A PostgreSQL server for tests: one for each process, on a Unix socket, started when the first test needs it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from llmprune.service.database.postgresql import PostgresqlDatabase

_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))  # where Debian puts them
_SETTINGS = {
    "listen_addresses": "", "fsync": "off", "full_page_writes": "off", "shared_buffers": "16MB",
    "max_connections": "80", "autovacuum": "off", "log_min_messages": "fatal",
}  # fmt: skip


class PostgresqlServer:
    """A server with an empty cluster in a folder of its own."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.folder = Path(tempfile.mkdtemp(prefix="llmprune-pg-", dir="/tmp"))  # a socket's path is at most 107 bytes
        self._user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
        self._numbers = itertools.count()
        if self._user:
            shutil.chown(self.folder, self._user, self._user)
        self._run("initdb", "-D", self.folder / "data", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8")
        self._process = self._start()
        template = self._create("template_jobs")
        database = PostgresqlDatabase(template)
        database.migrate()
        database.close()

    def new_database(self, *, migrated: bool = True) -> str:
        """Return the address of a new database, with the tables or empty."""
        return self._create(f"test_{next(self._numbers)}", template="template_jobs" if migrated else "template0")

    def restart(self) -> None:
        """Stop the server, which ends every connection, and start it again."""
        self.stop()
        self._process = self._start()

    def stop(self, *, at_once: bool = False) -> None:
        """Stop the server, which ends every connection; ``at_once``: as in a crash, without a checkpoint."""
        self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
        self._process.wait(30)

    def end_connections(self) -> None:
        """End every connection to every database."""
        with psycopg.connect(self.address("postgres")) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )

    def start(self) -> None:
        """Start the server that was stopped."""
        self._process = self._start()

    def remove(self) -> None:
        """Stop the server and delete its files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def address(self, name: str) -> str:
        """Return the address of a database."""
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def _create(self, name: str, template: str = "template0") -> str:
        with psycopg.connect(self.address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        return self.address(name)

    def _run(self, name: str, *arguments: object) -> None:
        command = [str(self.program.with_name(name)), *map(str, arguments)]
        done = subprocess.run(command, user=self._user, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _start(self) -> subprocess.Popen[bytes]:
        options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        command = [str(self.program), "-D", str(self.folder / "data"), "-k", str(self.folder), *options]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command, user=self._user, cwd="/", stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.address("postgres")).close()
            except psycopg.OperationalError:
                assert process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.02)
            else:
                return process


_running: list[PostgresqlServer] = []


def server() -> PostgresqlServer:
    """Return this process's server; skip the test where PostgreSQL is not installed."""
    if not _PROGRAMS:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    if not _running:
        _running.append(PostgresqlServer(_PROGRAMS[-1]))
    return _running[0]


def remove_server() -> None:
    """Stop this process's server, if it has one."""
    while _running:
        _running.pop().remove()
