"""What jobs put out: events as they happen, the log, the report, every file of the run folder."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.jobs.hub_token import redact
from llmprune.service.jobs.job import ENDED, Job
from llmprune.service.jobs.tokens import Caller

router = APIRouter(prefix="/v1/jobs/{job}", tags=["outputs"])

LOG_PART = 1_000_000  # bytes of a log in one answer
_LOOK_EVERY = 0.5  # seconds
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'"


class Artifact(BaseModel):
    """A file of a run folder."""

    name: str
    bytes: int


def known_job(job: JobId, service: TheService, *, caller: TheCaller) -> str:
    """The id of a job that the caller may read. A dependency, for once a stream has begun no 404 can be sent."""
    return service.job(job, caller).id


@router.get("/events", response_class=EventSourceResponse, responses=documented(404, 422))
async def job_events(
    job: Annotated[str, Depends(known_job)],
    service: TheService,
    *,
    caller: TheCaller,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=30)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Every change of a job, from its first or from Last-Event-ID on, until it has ended."""
    after = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    while True:
        found, rows = await run_in_threadpool(_news, service, job, caller=caller, after=min(after, 2**62))
        if found is None:  # deleted meanwhile, or the caller's token was revoked
            return
        for row in rows:
            after = row["id"]
            yield ServerSentEvent(raw_data=service.paths.hide(row["data"]), event=row["kind"], id=str(after))
        if found.state in ENDED and not rows:
            return
        if not rows:
            await asyncio.sleep(_LOOK_EVERY)  # FastAPI itself says something after 15 silent seconds


def _news(service: Service, job: str, *, caller: Caller, after: int) -> tuple[Job | None, list[sqlite3.Row]]:
    """A job and its events; None where the caller may no longer read it."""
    # the state first: an event that is written between the two reads is then not missed
    found = service.find(job, caller) if service.tokens.is_current(caller) else None
    return found, service.jobs.events(job, after) if found else []


@router.get("/log", response_class=PlainTextResponse, responses=documented(404, 422))
def job_log(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    offset: Annotated[
        int, Query(ge=0, le=2**62, description="Bytes to leave out: X-Next-Offset of the last part.")
    ] = 0,
) -> PlainTextResponse:
    """What all attempts at a job have printed, at most a megabyte at a time."""
    part, after = read_log(service, service.job(job, caller).id, offset=offset)
    return PlainTextResponse(part.decode("utf-8", "replace"), headers={"X-Next-Offset": str(after)})


def read_log(service: Service, job: str, *, offset: int, size: int = LOG_PART) -> tuple[bytes, int]:
    """A part of a log without the job's token and the server's paths, and where the next begins."""
    folder = service.settings.folder(job)
    margin = 1_000  # more than a token or a path is long, so that none is cut in two
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
    """The files that a job's run has written."""
    return artifacts(service, service.job(job, caller).id)


def artifacts(service: Service, job: str) -> list[Artifact]:
    """The files under a job's run folder that are not hidden."""
    folder = service.settings.run_folder(job)
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".partial"))
        for name in sorted(names):
            path = Path(place) / name
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                shown = _shown(service, job, path=path)
                size = path.stat().st_size if shown is None else len(shown)
                found.append(Artifact(name=str(path.relative_to(folder)), bytes=size))
    return found


def _shown(service: Service, job: str, *, path: Path) -> bytes | None:
    """A file that may name folders of the server, as clients see it; None: as it is, as every file of the model."""
    folder = service.settings.run_folder(job)
    record = path.parent == folder and path.suffix in (".json", ".html")
    if not record and path.parent != folder / "card":
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return service.paths.hide_between(content, 0, end=len(content))


@router.get("/artifacts/{name:path}", response_class=FileResponse, responses=documented(404, 422))
def get_artifact(job: JobId, name: str, *, service: TheService, caller: TheCaller) -> Response:
    """One file; ranges work, so a download can go on where it stopped."""
    place = service.artifact(job, name, caller=caller)
    shown = _shown(service, job, path=service.settings.run_folder(job) / name)
    if shown is not None:
        return Response(shown, media_type="application/octet-stream", headers=_attached(place.name))
    return FileResponse(place, media_type="application/octet-stream", filename=place.name)


@router.get("/report", responses=documented(404, 422))
def get_report(job: JobId, service: TheService, *, caller: TheCaller) -> dict[str, Any]:
    """The report's figures."""
    try:
        report = json.loads(service.artifact(job, "report.json", caller=caller).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        raise Refused(404, f"the report of job {job} cannot be read; a new job with its recipe makes another")
    shown: dict[str, Any] = service.paths.hide_in(report)
    return shown


@router.get("/report.html", response_class=FileResponse, responses=documented(404, 422))
def get_report_page(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """The report's page; it may run nothing and load nothing."""
    place = service.artifact(job, "report.html", caller=caller)
    headers = {"Content-Security-Policy": REPORT_POLICY, "X-Frame-Options": "SAMEORIGIN"}
    if not place.stat().st_size:
        raise Refused(404, f"job {job} has no report yet")
    content = place.read_bytes()
    shown = service.paths.hide_between(content, 0, end=len(content))
    return Response(shown, media_type="text/html; charset=utf-8", headers=headers)


def _attached(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"', "Accept-Ranges": "none"}
