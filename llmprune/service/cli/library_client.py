"""Client for the model library: list and label models, make sweeps, upload run folders."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from llmprune.common.errors import OutputError, RecipeError, ServiceError
from llmprune.service.api.values import ModelList
from llmprune.service.client.calls import Call, hub_header, job_path, new_key
from llmprune.service.client.sync.client import Client
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.models import Model
from llmprune.service.jobs.sweep_axes import Sweep
from llmprune.service.jobs.upload_files import REPORT, FileProgress, Upload, is_run_file

PART_BYTES = 16 * 1024 * 1024  # of a file, in one request
_LONG = 600.0  # seconds; the service hashes a file with its last part
_TRIES = 5  # to go on with a file after a refusal


@dataclass(frozen=True)
class LocalFile:
    """A file of a run folder or of its archive."""

    name: str
    size: int  # bytes
    open: Callable[[], IO[bytes]]

    def described(self) -> dict[str, Any]:
        """Return name, size and SHA-256, as an upload begins with them."""
        with self.open() as file:
            found = hashlib.sha256()
            while part := file.read(PART_BYTES):
                found.update(part)
        return {"name": self.name, "bytes": self.size, "sha256": found.hexdigest()}


class LibraryClient(Client):
    """A connection to a service, with its model library."""

    def models(self, **filters: Any) -> ModelList:
        """Return a page of the library. ``filters``: search, stage, tag, base, owner, sort, order, after, limit."""
        return self.connection.ask(Call("GET", "/v1/models", ModelList, filters))

    def label(self, job: str, **labels: Any) -> Model:
        """Change labels of a model. ``labels``: stage, tags, add_tags, remove_tags, notes."""
        job_path(job)
        given = {name: value for name, value in labels.items() if value is not None}
        return self.connection.ask(Call("PATCH", f"/v1/models/{job}", Model, json=given))

    def sweep(
        self,
        recipe: str,
        vary: Sequence[str],
        *,
        overrides: Sequence[str] = (),
        hub_token: str | None = None,
        **settings: Any,
    ) -> Sweep:
        """Queue a job for every combination of values; ``vary``: texts as ``budget.parameters=0.9,0.8``.

        ``settings``: name, launcher, gpus, priority, time_limit, shared.
        """
        headers = {"Content-Type": "application/yaml"} | new_key() | hub_header(hub_token)
        params = settings | {"set": list(overrides), "vary": list(vary)}
        return self.connection.ask(Call("POST", "/v1/sweeps", Sweep, params, headers, recipe))

    def upload(
        self, folder: Path, *, progress: Callable[[int, int], None] = lambda sent, total: None, **settings: Any
    ) -> Job:
        """Upload a finished run folder, or its archive, and return its job. An interrupted upload is continued.

        ``progress`` gets the bytes sent and the bytes in all. ``settings``: name, shared, tags, notes.
        Raises OutputError where it is no finished run.
        """
        with run_files(folder) as files:
            given = {name: value for name, value in settings.items() if value}
            request = {"files": [file.described() for file in files], **given}
            begun = self.connection.ask(Call("POST", "/v1/models/uploads", Upload, json=request))
            if begun.job:
                return self.connection.ask(Call("GET", job_path(begun.job), Job))
            total, sent = sum(file.size for file in files), 0
            received = {file.name: file.received for file in begun.files}
            for file in files:
                for arrived in self._send_file(begun.id, file, received=received.get(file.name, 0)):
                    progress(sent + arrived, total)
                sent += file.size
            finish = f"/v1/models/uploads/{begun.id}/finish"
            return self.connection.ask(Call("POST", finish, Job, timeout=_LONG))

    def _send_file(self, upload: str, file: LocalFile, *, received: int) -> Iterator[int]:
        """Send the rest of a file; yield how much of it has arrived after each part."""
        path, failures = f"/v1/models/uploads/{upload}", 0
        with file.open() as source:
            while received < file.size or (not file.size and not failures):
                source.seek(received)
                part, address = source.read(PART_BYTES), f"{path}/files/{quote(file.name)}"
                try:
                    call = Call("PUT", address, FileProgress, {"offset": received}, content=part, timeout=_LONG)
                    self.connection.ask(call)
                    received += len(part)
                    if not file.size:
                        return
                except ServiceError:  # a part may have arrived whose answer was lost
                    failures += 1
                    state = self.connection.ask(Call("GET", path, Upload))
                    known = next((one.received for one in state.files if one.name == file.name), 0)
                    if failures >= _TRIES or known == received:
                        raise
                    received = known
                yield received


@contextmanager
def run_files(folder: Path) -> Iterator[list[LocalFile]]:
    """Open the files of a finished run folder, or of an uncompressed archive of one. Raises OutputError."""
    if not folder.is_dir() and not (folder.is_file() and tarfile.is_tarfile(folder)):
        raise OutputError(f"{folder} is no run folder and no archive of one; give what llmprune run wrote to")
    with nullcontext() if folder.is_dir() else tarfile.open(folder, "r:") as archive:
        files = _of_archive(archive) if archive else _of_folder(folder)
        if REPORT not in {file.name for file in files}:
            raise OutputError(f"{folder} has no {REPORT}; give the folder of a finished run")
        yield files


def _of_folder(folder: Path) -> list[LocalFile]:
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if is_run_file(name) and path.is_file() and not path.is_symlink():
            found.append(LocalFile(name, path.stat().st_size, lambda path=path: path.open("rb")))  # type: ignore[misc]
    return found


def _of_archive(archive: tarfile.TarFile) -> list[LocalFile]:
    found = []
    for member in archive.getmembers():
        name = member.name.removeprefix("./")
        if is_run_file(name) and member.isreg():
            found.append(LocalFile(name, member.size, lambda member=member: _opened(archive, member)))  # type: ignore[misc]
    return found


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    found = archive.extractfile(member)
    if found is None:
        raise RecipeError(f"{member.name} cannot be read from the archive")
    return found
