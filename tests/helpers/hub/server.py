"""A model hub on the loopback, small enough to read, that the real client libraries talk to.

It answers the requests with which ``huggingface_hub`` reads, downloads, uploads and commits: regular
files in the commit, large ones through git-LFS (in one part or several), ranges, redirects to
signed addresses, tokens, private and gated repositories, pull requests, and errors by
``X-Error-Code``. ``Hub.faults`` makes it fail as a real one would.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from helpers.hub.faults import Fault, Faulty
from helpers.hub.routes import make_app
from helpers.hub.state import File, Repo, User, blob_of, is_large, pointer


class Hub:
    """State of the hub, and its server on a bound socket."""

    def __init__(self, bound: socket.socket, store: Path, part_size: int = 0) -> None:
        self.url = "http://{}:{}".format(*bound.getsockname())
        self.storage = (
            f"http://localhost:{bound.getsockname()[1]}"  # another host to the client, which then sends no token
        )
        self.store, self.part_size = store, part_size
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.lines: list[str] = []  # METHOD path?query of every request
        self.waits: list[float] = []  # seconds that a client would have slept
        self.before_commit: Callable[[Repo], None] | None = None
        self.on_range: Callable[[str], None] | None = None
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # lines that are cut are meant
        app = Faulty(make_app(self), self.faults, self.lines)
        # Idle lines stay open: one that closes as a request comes would have the client send it twice.
        settings = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=3600)
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}, daemon=True)

    def start(self) -> None:
        """Start answering requests."""
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop answering requests."""
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def forget(self) -> None:
        """Reset the state for the next test."""
        for path in self.store.iterdir():
            path.unlink()
        for state in (self.users, self.repos, self.faults, self.lines, self.waits):
            state.clear()
        self.before_commit, self.on_range, self.part_size = None, None, 0

    def repo(self, name: str, kind: str = "model") -> Repo:
        """Return a repository that exists."""
        return self.repos[kind, name]

    def add_repo(self, name: str, files: dict[str, bytes], kind: str = "model", **settings: Any) -> Repo:
        """Add a repository of another user, with large files in the LFS store."""
        repo = self.repos[kind, name] = Repo(kind, name, settings.pop("private", False), **settings)
        repo.commit("main", {path: self.file(path, content) for path, content in files.items()}, "initial commit")
        return repo

    def file(self, path: str, content: bytes) -> File:
        """Return a file in the form of a commit; a large one is put into the LFS store."""
        if not is_large(path, len(content)):
            return File(len(content), blob_of(content), content)
        digest = hashlib.sha256(content).hexdigest()
        (self.store / digest).write_bytes(content)
        return pointer(digest, len(content))

    def content(self, repo: Repo, path: str, ref: str = "main") -> bytes:
        """Return the content of a file of a repository."""
        file = repo.commits[repo.refs[ref]][path]
        return (self.store / file.lfs).read_bytes() if file.lfs else file.content or b""
