"""Publication of a running attempt: its run folder, progress and log go to the artefact store.

Contents are uploaded under keys that no manifest lists yet; the manifest that lists them is written last. Files that
have not changed are not read or uploaded again. Uploads take at most a fifth of the time, beside the run.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.service.artifacts.manifest import (
    Manifest,
    StoredFile,
    digest_of,
    keep_manifest,
    manifest_keys,
    write_manifest,
)
from llmprune.service.artifacts.snapshot import Stamp, files_in, link_snapshot, naming_files, stamp
from llmprune.service.artifacts.store import ArtifactStore

logger = logging.getLogger(__name__)

LOG_PIECE = 1_000_000  # bytes
_SHARE = 0.2  # largest share of the time that uploads of snapshots may take
_CHECK_EVERY = 5.0  # seconds
_MAX_PROGRESS = 10_000  # bytes


class Superseded(Exception):
    """A later attempt at the job has begun: this one must end."""


@dataclass
class Publisher:
    """Publishes one attempt. ``folder``: the job's folder on this machine, which holds run folder, log and progress."""

    store: ArtifactStore
    job: str
    attempt: int
    folder: Path
    last: Manifest | None = None  # the newest manifest: of this attempt or an earlier one
    _known: dict[Stamp, StoredFile] = field(default_factory=dict)  # objects by the stamps of their files
    _names: dict[Path, Stamp | None] = field(default_factory=dict)  # naming files when last published
    _next: float = 0.0  # time.monotonic() of the next publication
    _next_check: float = 0.0  # of the next look for a later attempt

    def begin(self) -> None:
        """Tell earlier attempts, which a cluster may have given up while they run on, that this one has begun."""
        self.store.write(f"{self.job}/begun/{self.attempt:06}", b"")

    @property
    def run_folder(self) -> Path:
        """Run folder of the job on this machine."""
        return self.folder / "run"

    def publish_changes(self) -> None:
        """Publish the run folder if the run has made a snapshot or a product since. See ``publish``."""
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _CHECK_EVERY
            self._require_newest()
        is_due = time.monotonic() >= self._next and self.run_folder.is_dir()
        if is_due and naming_files(self.run_folder) != self._names:
            self.publish()

    def publish(self) -> None:
        """Upload what has changed, then the manifest. Raises StoreUnreachable, Superseded and OSError."""
        begin = time.monotonic()
        copy = self.folder / "snapshot"
        if not link_snapshot(self.run_folder, copy):
            return
        try:
            self._require_newest()
            names = naming_files(copy)
            files = [file for path in files_in(copy) if (file := self._stored(path, copy)) is not None]
            self._write(files)
            self._names = {self.run_folder / path.relative_to(copy): there for path, there in names.items()}
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        self._next = time.monotonic() + (time.monotonic() - begin) * (1 / _SHARE - 1)

    def sweep(self) -> None:
        """Remove the objects and manifests that the newest manifest does not need."""
        used = {*self.last.objects} if self.last else set()
        unused = [key for key in self.store.keys(f"{self.job}/objects/") if key not in used]
        self.store.remove(unused + manifest_keys(self.store, self.job)[:-1])

    def _require_newest(self) -> None:
        begun = self.store.keys(f"{self.job}/begun/")
        if begun and (newest := int(begun[-1].rpartition("/")[2])) > self.attempt:
            raise Superseded(f"attempt {newest} at job {self.job} has begun")

    def _stored(self, path: Path, copy: Path) -> StoredFile | None:
        """Return a file with its object, uploaded where it is new; None where it changed meanwhile."""
        name, before = str(path.relative_to(copy)), stamp(path)
        known = self._known.get(before) if before is not None else None
        if before is None:
            return None
        if known is None:
            size, digest = digest_of(path)
            known = self._find(digest) or StoredFile(
                name=name, key=f"{self.job}/objects/{self.attempt}-{digest}", bytes=size, sha256=digest
            )
            if not self._is_stored(known):
                self.store.upload(path, known.key)
            if stamp(path) != before:
                return None
            self._known[before] = known
        return known.model_copy(update={"name": name, "modified": before[1]})

    def _find(self, digest: str) -> StoredFile | None:
        listed = self.last.files if self.last else ()
        return next((file for file in (*listed, *self._known.values()) if file.sha256 == digest), None)

    def _is_stored(self, file: StoredFile) -> bool:
        listed = self.last.objects if self.last else {}
        return file.key in listed

    def _write(self, files: list[StoredFile]) -> None:
        before = self.last
        number = before.number + 1 if before is not None and before.attempt == self.attempt else 0
        manifest = Manifest(attempt=self.attempt, number=number, files=tuple(files))
        write_manifest(self.store, self.job, manifest=manifest)
        self.last = manifest
        keep_manifest(self.folder, manifest)
        self._known = {there: file for there, file in self._known.items() if file.key in manifest.objects}
        if before is not None:
            self.store.remove([key for key in before.objects if key not in manifest.objects])


@dataclass
class Reporter:
    """Copies the log and the progress of an attempt to the store, a piece at a time."""

    store: ArtifactStore
    job: str
    attempt: int
    folder: Path
    log_limit: int  # bytes; the service ends a job that writes more
    _sent: int = 0  # bytes of the log
    _reported: dict[str, Any] | None = None

    def report(self) -> None:
        """Send the new part of the log, then the status. Raises StoreUnreachable and OSError."""
        size = min(self._log.stat().st_size, self.log_limit + 1) if self._log.is_file() else 0
        while self._sent < size:
            with self._log.open("rb") as file:
                file.seek(self._sent)
                piece = file.read(min(LOG_PIECE, size - self._sent))
            self.store.write(log_key(self.job, self.attempt, offset=self._sent), piece)
            self._sent += len(piece)
        status = {"progress": self._progress(), "log": self._sent}
        if status != self._reported:
            self.store.write(status_key(self.job, self.attempt), json.dumps(status).encode())
            self._reported = status

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"

    def _progress(self) -> str | None:
        try:
            with (self.folder / "progress.json").open("rb") as file:
                return file.read(_MAX_PROGRESS).decode("utf-8", "replace")
        except OSError:
            return None


def status_key(job: str, attempt: int) -> str:
    """Return the key of an attempt's status: its progress, and the bytes of its log."""
    return f"{job}/status/{attempt}.json"


def log_key(job: str, attempt: int, *, offset: int) -> str:
    """Return the key of a piece of an attempt's log that begins at an offset."""
    return f"{job}/log/{attempt}/{offset:012}"


def stop_key(job: str, attempt: int) -> str:
    """Return the key whose presence keeps an attempt from starting."""
    return f"{job}/stop/{attempt}"


def recipe_key(job: str) -> str:
    """Return the key of a job's recipe."""
    return f"{job}/recipe.yaml"
