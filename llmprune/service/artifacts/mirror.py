"""Copies of remote attempts in the service's data folder: log, progress, and the small files of the run folder.

The rest of the service reads them as if the job ran here. Large files stay in the store, from which they are served.
Copies are made in threads, so that a store that is away does not block the supervisor; each can be repeated.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ValidationError

from llmprune.common.errors import LLMPruneError
from llmprune.common.files import write_text
from llmprune.service.artifacts.manifest import (
    Manifest,
    StoredFile,
    fetch,
    keep_manifest,
    local_manifest,
    manifest_keys,
    read_manifest,
)
from llmprune.service.artifacts.publisher import log_key, status_key
from llmprune.service.artifacts.store import ArtifactStore

logger = logging.getLogger(__name__)

_SMALL = 64 * 10**6  # bytes of a file that is copied
_MOST_STATUS = 100_000  # bytes
_AT_A_TIME = 8
_ASK_EVERY = 10.0  # seconds
_WAITING = json.dumps({"step": "waiting for the artefact store", "done": None, "total": None, "seconds": None})
_BEGIN = "log-begin"  # file: the attempt, the size of the log when it began, and the bytes of it that are copied


class _Status(BaseModel):
    """Status of an attempt, as its node reports it."""

    progress: str | None
    log: int  # bytes


@dataclass
class _Copies:
    """Copies of one attempt: how many were begun and made, and the number of the first one after the attempt's end."""

    thread: threading.Thread | None = None
    begun: int = 0
    made: int = 0
    final: int | None = None


@dataclass
class Mirror:
    """Copies of all remote attempts of a service."""

    store: ArtifactStore
    _attempts: dict[tuple[str, int], _Copies] = field(default_factory=dict)
    _limit: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_AT_A_TIME))
    _is_silent: bool = False
    _asked: tuple[float, threading.Thread | None] = (float("-inf"), None)  # when is_answering asked last
    _answers: bool = False

    def is_answering(self) -> bool:
        """Return whether the store answered some seconds ago, and ask again in a thread."""
        when, thread = self._asked
        if time.monotonic() - when > _ASK_EVERY and (thread is None or not thread.is_alive()):
            thread = threading.Thread(target=self._ask, daemon=True)
            self._asked = time.monotonic(), thread
            thread.start()
        return self._answers

    def _ask(self) -> None:
        try:
            self.store.read("no-such-object")
        except LLMPruneError as error:
            self._warn(f"{error}; jobs wait")
            self._answers = False
        else:
            self._answers, self._is_silent = True, False

    def _warn(self, message: str) -> None:
        if not self._is_silent:
            logger.warning("%s", message)
        self._is_silent = True

    def refresh(self, job: str, attempt: int, *, folder: Path) -> None:
        """Begin to copy what is new of an attempt, unless a copy is under way."""
        copies = self._attempts.setdefault((job, attempt), _Copies())
        if copies.thread is None or not copies.thread.is_alive():
            copies.begun += 1
            copies.thread = threading.Thread(
                target=self._copy, args=(copies, copies.begun), daemon=True,
                kwargs={"job": job, "attempt": attempt, "folder": folder},
            )  # fmt: skip
            copies.thread.start()

    def is_complete(self, job: str, attempt: int, *, folder: Path) -> bool:
        """Return whether everything of an attempt that has ended is copied; until then, begin to copy it."""
        copies = self._attempts.setdefault((job, attempt), _Copies())
        if copies.final is None:
            copies.final = copies.begun + 1  # a copy under way may have begun before the attempt ended
        if copies.made >= copies.final:
            self.forget(job, attempt)
            return True
        self.refresh(job, attempt, folder=folder)
        return False

    def forget(self, job: str, attempt: int) -> None:
        """Forget an attempt that is over."""
        self._attempts.pop((job, attempt), None)

    def _copy(self, copies: _Copies, number: int, *, job: str, attempt: int, folder: Path) -> None:
        with self._limit:
            try:
                copy_attempt(self.store, job, attempt=attempt, folder=folder)
            except (LLMPruneError, OSError) as error:
                self._warn(f"job {job}: {error}; trying again")
                with suppress(LLMPruneError):
                    write_text(folder / "progress.json", _WAITING)
            else:
                self._is_silent, copies.made = False, number


def copy_attempt(store: ArtifactStore, job: str, *, attempt: int, folder: Path) -> None:
    """Copy what is new of an attempt. Raises StoreUnreachable, DiskError and OSError."""
    text = store.read(status_key(job, attempt), end=_MOST_STATUS)
    if text is not None:
        try:
            status = _Status.model_validate_json(text)
        except ValidationError:  # a store without atomic writes: the next copy reads it whole
            return
        _copy_log(store, job, attempt=attempt, folder=folder, size=status.log)
        if status.progress is not None:
            write_text(folder / "progress.json", status.progress)
    _copy_files(store, job, folder=folder)


def _copy_log(store: ArtifactStore, job: str, *, attempt: int, folder: Path, size: int) -> None:
    """Write the new pieces of an attempt's log behind those of earlier attempts; a piece may be written twice."""
    place, log = folder / _BEGIN, folder / "log.txt"
    known = place.read_text(encoding="ascii").split() if place.is_file() else []
    if known[:1] != [str(attempt)]:
        begin = log.stat().st_size if log.is_file() else 0
        write_text(place, f"{attempt} {begin} 0")
        known = [str(attempt), str(begin), "0"]
    begin, offset = int(known[1]), int(known[2])
    while offset < size:
        piece = store.read(log_key(job, attempt, offset=offset))
        if not piece:
            return
        with log.open("r+b" if log.is_file() else "wb") as file:
            file.seek(begin + offset)
            file.write(piece)
        offset += len(piece)
        write_text(place, f"{attempt} {begin} {offset}")


def _copy_files(store: ArtifactStore, job: str, *, folder: Path) -> None:
    """Copy the small files of the newest manifest, then the manifest; delete small files that it no longer lists."""
    before = local_manifest(folder)
    for key in reversed(manifest_keys(store, job)):
        if before is not None and key.endswith(f"/{before.attempt:06}-{before.number:08}.json"):
            return
        manifest = read_manifest(store, key)
        if manifest is not None:
            damaged = fetch(store, manifest, folder=folder / "run", wanted=is_copied)
            if damaged:  # a newer manifest has replaced this one meanwhile
                logger.info("job %s: %s is not in the store", job, damaged[0])
                return
            keep_manifest(folder, manifest)
            for name in _no_longer_listed(before, manifest):
                (folder / "run" / name).unlink(missing_ok=True)
            return


def _no_longer_listed(before: Manifest | None, now: Manifest) -> set[str]:
    listed = {file.name for file in before.files if is_copied(file)} if before else set()
    return listed - {file.name for file in now.files}


def is_copied(file: StoredFile) -> bool:
    """Return whether a file is small and not of a model, so that the data folder has a copy."""
    return file.bytes <= _SMALL and ("/" not in file.name or file.name.startswith("card/"))
