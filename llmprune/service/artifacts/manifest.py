"""Manifests: the files of a run folder in the artefact store, with sizes and checksums.

A manifest is written last, under a new number; the one with the highest attempt and number is valid. An attempt on a
machine that was given up can therefore never replace what a later attempt wrote.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llmprune.common.files import write_text
from llmprune.service.artifacts.store import ArtifactStore

logger = logging.getLogger(__name__)

STORED = "stored.json"  # copy of the newest manifest in the job's folder of the service
_NAME = re.compile(r"/\d{6}-\d{8}\.json$")
_PIECE = 2**22  # bytes


class StoredFile(BaseModel):
    """A file of a run folder and the object with its contents."""

    model_config = ConfigDict(frozen=True)

    name: str  # path in the run folder
    key: str = Field(pattern=r"^[\w/.-]+$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    modified: int | None = None  # nanoseconds since 1970: runs know a model in a folder by its files' names and times

    @field_validator("name")
    @classmethod
    def _is_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ValueError(f"{name!r} is outside the run folder")
        return name


class Manifest(BaseModel):
    """The files of a run folder at one moment."""

    model_config = ConfigDict(frozen=True)

    attempt: int = Field(ge=0)
    number: int = Field(ge=0)  # of the attempt's manifests
    files: tuple[StoredFile, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all its objects."""
        return sum(self.objects.values())

    @property
    def objects(self) -> dict[str, int]:
        """Bytes of each of its objects, by key."""
        return {file.key: file.bytes for file in self.files}

    def find(self, name: str) -> StoredFile | None:
        """Return the file of this name."""
        return next((file for file in self.files if file.name == name), None)


def write_manifest(store: ArtifactStore, job: str, *, manifest: Manifest) -> str:
    """Make a manifest valid; return its key. Raises StoreUnreachable."""
    key = f"{job}/manifests/{manifest.attempt:06}-{manifest.number:08}.json"
    store.write(key, manifest.model_dump_json().encode())
    return key


def manifest_keys(store: ArtifactStore, job: str) -> list[str]:
    """Return the keys of a job's manifests, the newest last. Raises StoreUnreachable."""
    return [key for key in store.keys(f"{job}/manifests/") if _NAME.search(key)]


def newest_manifest(store: ArtifactStore, job: str) -> Manifest | None:
    """Return the valid manifest of a job; None where there is none. Raises StoreUnreachable."""
    for key in reversed(manifest_keys(store, job)):
        found = read_manifest(store, key)
        if found is not None:
            return found
    return None


def read_manifest(store: ArtifactStore, key: str) -> Manifest | None:
    """Return a manifest; None where it is absent or cannot be read. Raises StoreUnreachable."""
    text = store.read(key)
    try:
        return Manifest.model_validate_json(text) if text is not None else None
    except ValidationError:
        logger.warning("%s/%s is damaged; an older manifest is used", store.url, key)
        return None


def local_manifest(folder: Path) -> Manifest | None:
    """Return the service's copy of the newest manifest of a job, from the job's folder; None where there is none."""
    try:
        return Manifest.model_validate_json((folder / STORED).read_bytes())
    except (OSError, ValidationError):
        return None


def keep_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the service's copy of a manifest. Raises DiskError."""
    write_text(folder / STORED, manifest.model_dump_json())


def digest_of(path: Path) -> tuple[int, str]:
    """Return the size and the SHA-256 of a file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def fetch(
    store: ArtifactStore, manifest: Manifest, *, folder: Path, wanted: Callable[[StoredFile], bool] = lambda _: True
) -> list[str]:
    """Download the files of a manifest that differ or are absent; return the names of those that are damaged.

    A file appears whole or not at all, and its checksum is compared. Raises StoreUnreachable and OSError.
    """
    damaged = []
    for file in filter(wanted, manifest.files):
        path = folder / file.name
        if path.is_file() and path.stat().st_size == file.bytes and digest_of(path)[1] == file.sha256:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        if store.download(file.key, partial) and digest_of(partial) == (file.bytes, file.sha256):
            if file.modified is not None:
                os.utime(partial, ns=(file.modified, file.modified))
            partial.replace(path)
        else:
            partial.unlink(missing_ok=True)
            damaged.append(file.name)
    return damaged


def partial_of(path: Path) -> Path:
    """Return the place of a file that is being downloaded."""
    return path.with_name(f".{path.name}.fetched")


def without(manifest: Manifest, names: Iterable[str]) -> Manifest:
    """Return the next manifest, without the files in these folders of the run folder."""
    folders = tuple(f"{name}/" for name in names)
    left = tuple(file for file in manifest.files if not file.name.startswith(folders))
    return manifest.model_copy(update={"number": manifest.number + 1, "files": left})
