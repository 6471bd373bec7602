"""Logs of a service: messages on standard error, and two files in the data folder.

``access.jsonl`` has a line for each request; old parts are deleted. ``audit.jsonl`` has a line for each attempt to
change something; no line is deleted. Worker threads write both, so a slow disk never blocks the event loop.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import Any

from llmprune.common.printing import LOG_FORMAT, LineFormatter

ACCESS, AUDIT = "access.jsonl", "audit.jsonl"
access = logging.getLogger("llmprune.service.access")
audit = logging.getLogger("llmprune.service.audit")

_PART_BYTES, _OLD_PARTS = 20_000_000, 4  # of the access log: bytes in one file, and older files that are kept


def log_with_time() -> None:
    """Send this process's log lines to standard error, each with its time, without uvicorn's warnings about clients."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(f"%(asctime)s {LOG_FORMAT}", "%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("llmprune").handlers.clear()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def record(**fields: Any) -> str:
    """Return the current time and the fields as a line of JSON."""
    return json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | fields)


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Write both logs into a folder while the block runs."""
    files = {
        access: _PrivateParts(folder / ACCESS, maxBytes=_PART_BYTES, backupCount=_OLD_PARTS, encoding="utf-8"),
        audit: _PrivateFile(folder / AUDIT, encoding="utf-8"),
    }
    listeners = []
    for logger, file in files.items():
        lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        logger.handlers, logger.propagate = [QueueHandler(lines)], False
        logger.setLevel(logging.INFO)
        listeners.append(QueueListener(lines, file))
        listeners[-1].start()
    try:
        yield
    finally:
        for listener, (logger, file) in zip(listeners, files.items(), strict=True):
            logger.handlers.clear()
            listener.stop()
            file.close()


def audit_command(folder: Path, *, action: str, **fields: Any) -> None:
    """Add a line to the audit log for a command on the service's machine."""
    path = folder / AUDIT
    _make_private(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(record(caller=f"{_user()} (this machine)", action=action, **fields) + "\n")


class _PrivateParts(RotatingFileHandler):
    """Writes files that only this user can read."""

    def _open(self) -> TextIOWrapper:
        _make_private(Path(self.baseFilename))
        return super()._open()


class _PrivateFile(WatchedFileHandler):
    """Writes a file that only this user can read."""

    def _open(self) -> TextIOWrapper:
        _make_private(Path(self.baseFilename))
        return super()._open()


def _make_private(path: Path) -> None:
    """Make a file that only this user can ever read, where there is none."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have no name
        return f"uid {os.getuid()}"
