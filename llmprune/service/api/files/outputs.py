"""Routes of the outputs of a job: events, log, report, and every file of the run folder."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from llmprune.results.run_folder.products import QUANTIZED_MODEL
from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.values import Artifact
from llmprune.service.database.database import DatabaseUnavailable, Row
from llmprune.service.jobs.hub_token import redact
from llmprune.service.jobs.job import ENDED, Job
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1/jobs/{job}", tags=["outputs"])

LOG_PART = 1_000_000  # bytes of a log in one answer
_POLL_EVERY = 0.5  # seconds
_WAIT_FOR_DATABASE = 2.0  # seconds
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
)


def known_job(job: JobId, service: TheService, *, caller: TheCaller) -> str:
    """Return the id of a job that the caller may read. A dependency: once a stream has begun it cannot answer 404."""
    return service.job(job, caller).id


@router.get("/events", response_class=EventSourceResponse, responses=documented(404, 422))
async def job_events(
    job: Annotated[str, Depends(known_job)],
    service: TheService,
    *,
    caller: TheCaller,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=30)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Stream every change of a job, from the first one or the one after Last-Event-ID, until it has ended."""
    after = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    while True:
        try:
            found, rows = await run_in_threadpool(_job_and_events, service, job, caller=caller, after=min(after, 2**62))
        except DatabaseUnavailable:  # the stream outlives a restart of the database
            await asyncio.sleep(_WAIT_FOR_DATABASE)
            continue
        if found is None:  # deleted meanwhile, or the caller's token was revoked
            return
        for row in rows:
            after = row["id"]
            yield ServerSentEvent(raw_data=service.paths.hide(row["data"]), event=row["kind"], id=str(after))
        if found.state in ENDED and not rows:
            return
        if not rows:
            await asyncio.sleep(_POLL_EVERY)  # FastAPI itself sends a comment after 15 seconds


def _job_and_events(service: Service, job: str, *, caller: Caller, after: int) -> tuple[Job | None, list[Row]]:
    """Return a job and its events after the event ``after``; None where the caller may no longer read it."""
    # the state is read first, so that an event written between the two reads is not missed
    found = service.find(job, caller) if service.tokens.is_current(caller) else None
    return found, service.jobs.events(job, after) if found else []


@router.get("/log", response_class=PlainTextResponse, responses=documented(404, 422))
def job_log(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    offset: Annotated[int, Query(ge=0, le=2**62, description="Bytes to skip: X-Next-Offset of the previous part.")] = 0,
) -> PlainTextResponse:
    """Return the output of all attempts at a job, at most a megabyte at a time."""
    part, after = read_log(service, service.job(job, caller).id, offset=offset)
    return PlainTextResponse(part.decode("utf-8", "replace"), headers={"X-Next-Offset": str(after)})


def read_log(service: Service, job: str, *, offset: int, size: int = LOG_PART) -> tuple[bytes, int]:
    """Return a part of a log, without the job's token and the server's paths, and the offset of the next part."""
    folder = service.settings.folder(job)
    margin = 1_000  # longer than a token or a path, so that none is cut in two
    begin = max(0, offset - margin)
    try:
        with service.settings.log(job).open("rb") as log:
            log.seek(begin)
            text = redact(log.read(size + 2 * margin), folder)
    except OSError:
        return b"", offset
    first, last = offset - begin, min(offset - begin + size, len(text))
    if last <= first:
        return b"", offset
    return service.paths.hide_between(text, first, end=last), begin + last


@router.get("/artifacts", responses=documented(404, 422))
def list_artifacts(job: JobId, service: TheService, *, caller: TheCaller) -> list[Artifact]:
    """List the files that a job's run has written."""
    return artifacts(service, service.job(job, caller).id)


def artifacts(service: Service, job: str) -> list[Artifact]:
    """List the files in a job's run folder, without hidden and partial ones."""
    folder = service.settings.run_folder(job)
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".partial"))
        for name in sorted(names):
            path = Path(place) / name
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                shown = shown_content(service, job, path=path)
                size = path.stat().st_size if shown is None else len(shown)
                found.append(Artifact(name=str(path.relative_to(folder)), bytes=size))
    stored = [Artifact(name=file.name, bytes=file.bytes) for file in service.stored_files.listed(job)]
    return sorted([*found, *stored], key=lambda file: file.name) if stored else found


def shown_content(service: Service, job: str, *, path: Path) -> bytes | None:
    """Return a file that may contain paths of the server, with these renamed; None for every other file."""
    folder = service.settings.run_folder(job)
    is_record = path.parent == folder and path.suffix in (".json", ".html")
    if not is_record and path.parent not in (folder / "card", folder / "card" / QUANTIZED_MODEL):
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return service.paths.hide_between(content, 0, end=len(content))


class LargeFile(FileResponse):
    """A file, read in parts of 256 KB: each part costs a change of threads."""

    chunk_size = 256 * 1024


@router.get("/artifacts/{name:path}", response_class=LargeFile, responses=documented(404, 416, 422, 503))
def get_artifact(
    job: JobId,
    name: str,
    *,
    service: TheService,
    caller: TheCaller,
    wanted: Annotated[str | None, Header(alias="Range", max_length=200, include_in_schema=False)] = None,
    condition: Annotated[str | None, Header(alias="If-Range", max_length=200, include_in_schema=False)] = None,
) -> Response:
    """Download one file. Range requests are supported, so an interrupted download can be continued."""
    stored = service.stored_files.find(service.job(job, caller).id, name)
    if stored is not None:
        return service.stored_files.response(stored, wanted=wanted, condition=condition)
    place = service.artifact(job, name, caller=caller)
    shown = shown_content(service, job, path=service.settings.run_folder(job) / name)
    if shown is not None:
        return Response(shown, media_type="application/octet-stream", headers=_attached(place.name))
    return LargeFile(place, media_type="application/octet-stream", filename=place.name)


@router.get("/report", responses=documented(404, 422))
def get_report(job: JobId, service: TheService, *, caller: TheCaller) -> dict[str, Any]:
    """Return the report of a job as JSON."""
    try:
        report = json.loads(service.artifact(job, "report.json", caller=caller).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        raise Refused(404, f"the report of job {job} cannot be read; submit its recipe as a new job")
    shown: dict[str, Any] = service.paths.hide_in(report)
    return shown


@router.get("/report.html", response_class=FileResponse, responses=documented(404, 422))
def get_report_page(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Return the report of a job as a page that may run no script and load nothing."""
    place = service.artifact(job, "report.html", caller=caller)
    headers = {"Content-Security-Policy": REPORT_POLICY, "X-Frame-Options": "SAMEORIGIN"}
    if not place.stat().st_size:
        raise Refused(404, f"job {job} has no report yet")
    content = place.read_bytes()
    shown = service.paths.hide_between(content, 0, end=len(content))
    return Response(shown, media_type="text/html; charset=utf-8", headers=headers)


def _attached(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"', "Accept-Ranges": "none"}
