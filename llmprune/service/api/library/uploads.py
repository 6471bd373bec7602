"""Routes of uploads: a finished run folder, file by file in parts, which becomes a model of the library."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from starlette.concurrency import run_in_threadpool

from llmprune.common.files import sha256_of
from llmprune.service.api.dependencies import TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.jobs.uploads.files import MAX_NAME, FileProgress, Upload, UploadFile
from llmprune.service.jobs.uploads.uploads import (
    UPLOAD_ID,
    OpenUpload,
    UploadRequest,
    Uploads,
    partial_of,
    received_bytes,
)
from llmprune.service.settings import Settings
from llmprune.service.supervisor.cleanup import over_quota
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1/models/uploads", tags=["models"])

PART_LIMIT = 64 * 1024 * 1024  # bytes of a part
_REQUEST_LIMIT = 512 * 1024  # bytes of a list of files
_BLOCK = 1024 * 1024  # bytes that are written at once
_PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of the part.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
UploadId = Annotated[str, InPath(pattern=f"^{UPLOAD_ID}$", description="The upload's id.")]


@router.post("", status_code=201, responses=documented(409, 413, 422, 507), max_body_size=_REQUEST_LIMIT)
def begin_upload(wanted: UploadRequest, service: TheService, *, caller: TheCaller) -> Upload:
    """Begin to upload a run folder. The same request returns the same upload, as far as it is."""
    refuse_over_quota(service.settings)
    return Uploads(service.database, service.settings).begin(wanted, caller)


@router.get("/{upload}", responses=documented(404, 422))
def show_upload(upload: UploadId, service: TheService, *, caller: TheCaller) -> Upload:
    """Show how much of each file has arrived."""
    return _own(Uploads(service.database, service.settings), upload, caller=caller).progress()


@router.put(
    "/{upload}/files/{name:path}",
    responses=documented(404, 409, 413, 422, 507),
    max_body_size=PART_LIMIT,
    openapi_extra=_PART_BODY,
)
async def send_part(
    upload: UploadId,
    name: Annotated[str, InPath(max_length=MAX_NAME, description="The file's path in the run folder.")],
    *,
    request: Request,
    service: TheService,
    caller: TheCaller,
    offset: Annotated[int, Query(ge=0, le=2**50, description="Bytes of the file that were sent before.")] = 0,
) -> FileProgress:
    """Send the next part of a file, at most 64 MiB. With its last part the file's SHA-256 is compared."""
    uploads = Uploads(service.database, service.settings)
    found = await run_in_threadpool(_own, uploads, upload, caller=caller)
    file = found.file(name)
    if file is None:
        raise Refused(404, f"upload {upload} has no file {name[:80]!r}")
    path = found.folder / name
    async with _receiving(path, offset) as partial:
        size = await _append(request, partial, room=file.bytes - offset) + offset
        if size == file.bytes:
            await run_in_threadpool(_complete, path, partial, file=file)
    await run_in_threadpool(uploads.touch, upload)
    return FileProgress(name=name, bytes=file.bytes, received=size)


@router.post("/{upload}/finish", status_code=201, responses=documented(404, 409, 422, 429, 507))
def finish_upload(upload: UploadId, service: TheService, *, caller: TheCaller) -> Job:
    """Check a complete upload: its report, its files, its weights. It becomes a finished job in the model library."""
    uploads = Uploads(service.database, service.settings)
    done = service.find(upload, caller) if uploads.find(upload) is None else None
    if done is not None and done.uploaded:  # the answer to an earlier request was lost
        return service.shown(done)
    return service.shown(uploads.finish(_own(uploads, upload, caller=caller)))


@router.delete("/{upload}", status_code=204, responses=documented(404, 422))
def delete_upload(upload: UploadId, service: TheService, *, caller: TheCaller) -> None:
    """Delete an upload that is not complete."""
    uploads = Uploads(service.database, service.settings)
    uploads.discard(_own(uploads, upload, caller=caller).id)


def refuse_over_quota(settings: Settings) -> None:
    """Raise Refused (507) where the jobs take more than the disk quota."""
    if over_quota(settings):
        raise Refused(507, "the disk quota of the service is reached; ask its operator, or delete models")


def _own(uploads: Uploads, upload: str, *, caller: Caller) -> OpenUpload:
    """Return an upload of the caller. Raises Refused (404)."""
    found = uploads.find(upload)
    if found is None or not caller.may_read(found.owner, shared=False):
        raise Refused(404, f"there is no upload {upload!r}; it is complete, or was deleted after a day without bytes")
    return found


@asynccontextmanager
async def _receiving(path: Path, offset: int) -> AsyncIterator[BinaryIO]:
    """Open a file for its next part, alone. Raises Conflict where the part begins elsewhere, or another one arrives."""
    partial = await run_in_threadpool(_opened, path, offset)
    try:
        yield partial
    finally:
        partial.close()


def _opened(path: Path, offset: int) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        raise Conflict(f"{path.name} has arrived completely")
    partial = partial_of(path).open("ab")
    try:
        fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = received_bytes(path)
        if size != offset:
            raise Conflict(f"{path.name}: the part begins at byte {offset:,}, and {size:,} bytes have arrived")
    except BlockingIOError as error:
        partial.close()
        raise Conflict(f"{path.name}: another part of it is arriving") from error
    except Conflict:
        partial.close()
        raise
    return partial


async def _append(request: Request, partial: BinaryIO, *, room: int) -> int:
    """Write the body of a request and return its bytes. Raises Refused (422) above ``room`` bytes."""
    written, block = 0, bytearray()
    async for chunk in request.stream():
        block += chunk
        if written + len(block) > room:
            raise Refused(422, f"the file has {written + len(block) - room:,} bytes more than it was announced with")
        if len(block) >= _BLOCK:
            written += await run_in_threadpool(partial.write, bytes(block))
            block.clear()
    written += await run_in_threadpool(partial.write, bytes(block))
    await run_in_threadpool(partial.flush)
    return written


def _complete(path: Path, partial: BinaryIO, *, file: UploadFile) -> None:
    """Compare a file's hash and give it its name. A file of another hash is deleted. Raises Refused (422)."""
    os.fsync(partial.fileno())
    place = partial_of(path)
    if sha256_of(place) != file.sha256:
        place.unlink()
        raise Refused(422, f"{file.name} has arrived with another SHA-256 than announced; send it again")
    place.replace(path)
