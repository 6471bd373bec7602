"""Routes of a job's files as a whole: one tar archive, and the SHA-256 of each file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmprune.common.files import read_json, write_text
from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.files.outputs import artifacts, shown_content
from llmprune.service.api.files.tar_stream import FileChanged, Member, TarStream
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.store_reads import Conflict

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/jobs/{job}", tags=["outputs"])

_CACHE = "checksums.json"  # in the job's folder: by name, the file's size, its time of change and its SHA-256
_TAR = "application/x-tar"
Part = Literal["all", "model"]


class ArchiveResponse(StreamingResponse):
    """An archive, or the rest of one. Where a file is deleted meanwhile, the connection ends before its length."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI
        """Send the archive."""
        try:
            await super().__call__(scope, receive, send)
        except FileChanged as error:
            logger.info("an archive was broken off: %s", error)


@router.get("/archive", response_class=ArchiveResponse, responses=documented(404, 409, 416, 422))
def get_archive(
    job: JobId,
    *,
    service: TheService,
    caller: TheCaller,
    part: Annotated[Part, Query(description="all: every file of the run; model: the model alone.")] = "all",
    wanted: Annotated[str | None, Header(alias="Range", max_length=100, description="bytes=FIRST-")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range", max_length=100)] = None,
) -> Response:
    """Download the files of an ended job as one tar archive, with paths as in the run folder.

    The same job gives the same bytes. A download can continue with Range: bytes=FIRST-.
    """
    found = service.job(job, caller)
    archive = TarStream(_members(service, found, part=part), time=int(found.finished or found.created))
    tag = f'"{archive.version}"'
    name = f"{job}-model.tar" if part == "model" else f"{job}.tar"
    headers = {"ETag": tag, "Accept-Ranges": "bytes", "Content-Disposition": f'attachment; filename="{name}"'}
    range_ = re.fullmatch(r"bytes=(\d{1,18})-", wanted or "", re.ASCII)
    start = int(range_[1]) if range_ and if_range in (None, tag) else 0
    if start and start >= archive.size:
        raise Refused(
            416, f"the archive has {archive.size:,} bytes", headers={"Content-Range": f"bytes */{archive.size}"}
        )
    headers |= {"Content-Length": str(archive.size - start)}
    if start:
        headers |= {"Content-Range": f"bytes {start}-{archive.size - 1}/{archive.size}"}
    return ArchiveResponse(archive.read(start), 206 if start else 200, headers, _TAR)


@router.get("/checksums", responses=documented(404, 409, 422))
async def get_checksums(
    job: JobId,
    *,
    service: TheService,
    caller: TheCaller,
    name: Annotated[
        list[str], Query(default_factory=list, max_length=100, description="Only this file; may be repeated.")
    ],
) -> dict[str, str]:
    """Return the SHA-256 of an ended job's files, as downloads have them. They are computed once and kept."""
    # one at a time for all callers: it reads whole models, and a waiting request occupies no thread
    return await service.hash_queue.run("checksums", _checksums, service, service.job(job, caller), names=name)


def _members(service: Service, job: Job, *, part: Part) -> list[Member]:
    """Return the files of an archive. Raises Conflict while the job may change them, and Refused (404) without any."""
    _require_ended(job)
    folder = service.settings.run_folder(job.id)
    names = [file.name for file in artifacts(service, job.id)]
    chosen = sorted(one for one in names if part == "all" or one.startswith("model/"))
    members = []
    for one in chosen:
        stored = service.stored_files.find(job.id, one)
        if stored is not None:
            members.append(Member(one, stored.bytes, partial(service.stored_files.read, stored), stored.sha256))
            continue
        shown = shown_content(service, job.id, path=folder / one)
        if shown is not None:
            members.append(Member(one, len(shown), shown, hashlib.sha256(shown).hexdigest()))
        else:
            with suppress(OSError):  # deleted since it was listed
                found = (folder / one).lstat()
                members.append(Member(one, found.st_size, folder / one, str(found.st_mtime_ns)))
    if not members:
        gone = "; the clean-up has deleted its model" if job.cleaned else ""
        raise Refused(404, f"job {job.id} has no {'model' if part == 'model' else 'files'} to download{gone}")
    return members


def _checksums(service: Service, job: Job, *, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 by name. Raises Refused (404) for a name that the job does not have."""
    _require_ended(job)
    folder, cache = service.settings.run_folder(job.id), service.settings.folder(job.id) / _CACHE
    there = [file.name for file in artifacts(service, job.id)]
    for missing in [one for one in names if one not in there]:
        raise Refused(404, f"job {job.id} has no artefact {missing!r}")
    known = _read(cache)
    hashes: dict[str, str] = {}
    for one in names or there:
        stored = service.stored_files.find(job.id, one)
        if stored is not None:
            hashes[one] = stored.sha256
            continue
        path = folder / one
        shown = shown_content(service, job.id, path=path)
        if shown is not None:
            hashes[one] = hashlib.sha256(shown).hexdigest()
            continue
        with suppress(OSError, FileChanged):  # deleted since it was listed
            found = path.lstat()
            facts = [found.st_size, found.st_mtime_ns]
            if known.get(one, [])[:2] != facts:
                known[one] = [*facts, _sha256(Member(one, found.st_size, path))]
            hashes[one] = known[one][2]
    with suppress(OSError):  # the job was deleted meanwhile
        if service.settings.folder(job.id).is_dir():
            write_text(cache, json.dumps(known))
    return hashes


def _require_ended(job: Job) -> None:
    if not job.ended:
        raise Conflict(f"job {job.id} is {job.state}, and its files still change; wait until it has ended")


def _sha256(member: Member) -> str:
    digest = hashlib.sha256()
    for part in member.read(0):
        digest.update(part)
    return digest.hexdigest()


def _read(cache: Path) -> dict[str, list[Any]]:
    found = read_json(cache)
    return {name: facts for name, facts in found.items() if len(facts) == 3} if isinstance(found, dict) else {}
