"""Files of jobs on other machines, served from the artefact store: in pieces, whole or one range."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote

from fastapi.responses import Response, StreamingResponse

from llmprune.service.api.error_responses import Refused
from llmprune.service.api.files.tar_stream import FileChanged
from llmprune.service.artifacts.manifest import StoredFile, local_manifest
from llmprune.service.artifacts.mirror import is_copied
from llmprune.service.artifacts.store import ArtifactStore, StoreUnreachable
from llmprune.service.settings import Settings

_PIECE = 4 * 2**20  # bytes of one request to the store


@dataclass(frozen=True)
class StoredFiles:
    """Files of jobs in the artefact store of a service, which may have none."""

    settings: Settings
    store: ArtifactStore | None

    @classmethod
    def of(cls, settings: Settings) -> StoredFiles:
        """Open the store of the settings."""
        return cls(settings, ArtifactStore(settings.artifacts, pause=10.0) if settings.artifacts else None)

    def listed(self, job: str) -> list[StoredFile]:
        """Return the files of a job that are only in the store."""
        manifest = local_manifest(self.settings.folder(job)) if self.store is not None else None
        folder = self.settings.run_folder(job)
        hidden = [] if manifest is None else [file for file in manifest.files if not is_hidden(file.name)]
        return [file for file in hidden if not is_copied(file) and not (folder / file.name).is_file()]

    def find(self, job: str, name: str) -> StoredFile | None:
        """Return a file of a job that is only in the store."""
        return next((file for file in self.listed(job) if file.name == name), None)

    def read(self, file: StoredFile, begin: int) -> Iterator[bytes]:
        """Yield the bytes of a file from ``begin`` on. Raises FileChanged where the store does not answer."""
        assert self.store is not None, "it has listed the file"
        try:
            yield from _pieces(self.store, file, begin=begin, end=file.bytes)
        except StoreUnreachable as error:
            raise FileChanged(str(error)) from error

    def response(self, file: StoredFile, *, wanted: str | None, condition: str | None) -> Response:
        """Return an answer with a file or a range of it. ``wanted``, ``condition``: the headers Range and If-Range.

        Raises Refused where the range is none of the file, or the store does not answer.
        """
        assert self.store is not None, "it has listed the file"
        etag = f'"{file.sha256}"'
        part = _range(wanted, file.bytes) if condition in (None, etag) else None
        begin, end = part or (0, file.bytes)
        headers = {
            "Content-Length": str(end - begin), "Accept-Ranges": "bytes", "ETag": etag,
            "Content-Disposition": f"attachment; filename*=utf-8''{quote(PurePosixPath(file.name).name)}",
        }  # fmt: skip
        if part is not None:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{file.bytes}"
        pieces = _pieces(self.store, file, begin=begin, end=end)
        try:
            first = next(pieces, b"")  # before the answer begins, so that a fault becomes an answer
        except StoreUnreachable as error:
            raise Refused(503, "the artefact store does not answer; try again later") from error
        body = _chained(first, pieces)
        return StreamingResponse(body, 206 if part is not None else 200, headers, media_type="application/octet-stream")


def is_hidden(name: str) -> bool:
    """Return whether a file of a run folder is none of its results."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") for part in parts) or any(part.endswith(".partial") for part in parts[:-1])


def _range(wanted: str | None, size: int) -> tuple[int, int] | None:
    """Return begin and end of a range; None where the whole file is wanted, or several ranges. Raises Refused."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", wanted.strip()) if wanted else None
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    begin = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if begin >= end:
        raise Refused(416, f"the file has {size} bytes, and the range begins behind them")
    return begin, end


def _pieces(store: ArtifactStore, file: StoredFile, *, begin: int, end: int) -> Iterator[bytes]:
    for place in range(begin, end, _PIECE):
        piece = store.read(file.key, begin=place, end=min(end, place + _PIECE))
        if piece is None:
            raise StoreUnreachable(f"the artefact store {store.url} has lost {file.key}")
        yield piece


def _chained(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
