"""Routes that download files, whole or in ranges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from helpers.hub.access import Refused, Routes, commit_of, require_signed, unquoted
from helpers.hub.state import SIGNATURE

CHUNK = 1024 * 1024


class DownloadRoutes(Routes):
    """Files of a revision; large ones from a storage with signed addresses."""

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        app.api_route("/datasets/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])(
            self.dataset_file
        )
        app.api_route("/cdn/{digest}", methods=["GET", "HEAD"])(self.large)
        app.api_route("/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])(self.model_file)

    def resolved(self, request: Request, kind: str, namespace: str, name: str, revision: str, path: str) -> Response:
        """Answer with a small file, or redirect to the storage of a large one."""
        repo = self.find(request, kind, namespace, name)
        if repo.gated and self.user(request) is None:
            raise Refused(401, "GatedRepo", f"Access to model {repo.name} is restricted")
        sha = commit_of(repo, unquoted(revision))
        file = repo.commits[sha].get(path)
        if file is None:
            answer = JSONResponse(None if request.method == "HEAD" else {"error": "Entry not found"}, 404)
            answer.headers.update({"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return answer
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.blob}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.lfs}"', "ETag": f'"{file.lfs}"'}
            return Response(
                status_code=302, headers=headers | {"Location": f"{self.hub.storage}/cdn/{file.lfs}?{SIGNATURE}"}
            )
        return _ranged(request, iter([file.content or b""]), file.size, headers)

    async def dataset_file(self, request: Request, namespace: str, name: str, revision: str, path: str) -> Response:
        """Answer with a file of a data set."""
        return self.resolved(request, "datasets", namespace, name, revision, path)

    async def large(self, request: Request, digest: str) -> Response:
        """Answer with a large file, or the requested range of it."""
        require_signed(request)
        path = self.hub.store / digest
        size = path.stat().st_size
        start = _range(request, size)[0]
        if self.hub.on_range and "range" in request.headers:
            self.hub.on_range(request.headers["range"])
        return _ranged(request, _read(path, start), size, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, start)

    async def model_file(self, request: Request, namespace: str, name: str, revision: str, path: str) -> Response:
        """Answer with a file of a model."""
        return self.resolved(request, "models", namespace, name, revision, path)


def _range(request: Request, size: int) -> tuple[int, int]:
    """Return the first and last byte of the requested range."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not found or not (found[1] or found[2]):
        return 0, size - 1
    if not found[1]:
        return max(size - int(found[2]), 0), size - 1
    return int(found[1]), min(int(found[2]), size - 1) if found[2] else size - 1


def _ranged(request: Request, chunks: Iterator[bytes], size: int, headers: dict[str, str], start: int = 0) -> Response:
    """Answer with the whole or the requested range; ``chunks`` begin at byte ``start``."""
    first, last = _range(request, size)
    length = max(last - first + 1, 0)
    headers = headers | {"Content-Length": str(length)}
    status = 200
    if request.headers.get("range"):
        status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(_cut(chunks, first - start, length), status, headers, "application/octet-stream")


def _read(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            yield chunk


def _cut(chunks: Iterator[bytes], skip: int, length: int) -> Iterator[bytes]:
    for chunk in chunks:
        piece = chunk[skip : skip + length]
        skip = max(skip - len(chunk), 0)
        length -= len(piece)
        if piece:
            yield piece
        if length <= 0:
            return
