"""Upload of a run's archive in the browser, with a script that shows its progress or as a plain form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
from anyio import CapacityLimiter, from_thread, to_thread
from fastapi import Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from llmprune.common.errors import RecipeError
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.api.library.uploads import refuse_over_quota
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.library.models import tags_of
from llmprune.service.jobs.store_reads import Conflict, QueueFull
from llmprune.service.jobs.uploads.archives import receive_archive
from llmprune.service.jobs.uploads.uploads import UploadRequest, Uploads
from llmprune.service.users.tokens import Caller
from llmprune.service.web.form_file import FormFile
from llmprune.service.web.responses import page, page_router

router = page_router()

_AT_ONCE = 8  # archives that arrive at a time; each occupies a thread
_SILENCE = 60.0  # seconds without a byte after which an upload is broken off
_SPILL = 256 * 2**20  # bytes of a refused upload that are read, because a browser hides an answer that comes earlier
_MAX_BODY = 2**50  # the limit of the settings is checked before anything is written


@router.get("/models/upload")
def upload_page(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Show the form."""
    del caller
    return page(request, "upload", at="models", problems=(), **form_values(request, service))


@router.post("/models/upload", max_body_size=_MAX_BODY)
async def upload_archive(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Unpack the archive of a form while it arrives, and show its job, or what is wrong with it."""
    body, limiter = _Body(request), _limiter_of(request)
    status, problems = 422, list[str]()
    try:
        if not limiter.available_tokens:
            raise Refused(429, f"{_AT_ONCE} archives are arriving; wait until one has arrived")
        job = await to_thread.run_sync(_received, request, body.pull, service, caller, limiter=limiter)
        await body.spill()
        return _uploaded(request, job)
    except RecipeError as error:
        problems = service.paths.hide_in(error.problems)
    except Conflict as error:
        status, problems = 409, [str(error)]
    except QueueFull as error:
        status, problems = 429, [str(error)]
    except Refused as error:
        status, problems = error.status_code, [error.detail]
    except OSError as error:
        status, problems = 507, [f"the disk cannot be used: {error.strerror or error}; tell the operator"]
    await body.spill()
    if not _is_page(request):
        raise Refused(status, "; ".join(problems))
    return page(request, "upload", status=status, at="models", problems=problems, **form_values(request, service))


def form_values(request: Request, service: Service) -> dict[str, Any]:
    """Return the values of the form."""
    server = str(request.base_url).rstrip("/")
    return {"upload_limit": service.settings.upload_limit, "everybody": service.settings.share_jobs, "server": server}


def _received(request: Request, pull: Callable[[], bytes], service: Service, caller: Caller) -> Job:  # noqa: PLR0917 - of a thread
    """Receive an archive in a thread. Raises Refused, RecipeError, Conflict and QueueFull."""
    refuse_over_quota(service.settings)
    size = int(request.headers.get("content-length") or 0)
    form = FormFile(request.headers.get("content-type", ""), pull)
    given = form.read_fields()
    if not form.name:
        raise Refused(422, "choose an archive")
    try:
        wanted = UploadRequest(
            files=(),
            name=given.get("name", "").strip() or None,
            shared=given.get("shared") == "on",
            tags=tags_of(given.get("tags", "")),
            notes=given.get("notes", "").replace("\r\n", "\n"),
        )
    except ValidationError as error:
        raise RecipeError([f"{one['loc'][0]}: {one['msg']}" for one in error.errors()], "upload") from None
    uploads = Uploads(service.database, service.settings)
    return receive_archive(form, uploads, request=wanted, size=size, caller=caller)


class _Body:
    """The body of a request, of which a thread pulls one part after the other."""

    def __init__(self, request: Request) -> None:
        self._parts = request.stream()

    def pull(self) -> bytes:
        """Return the next bytes, none at the end, from a thread. Raises Refused where they stay away."""
        return from_thread.run(self._next)

    async def spill(self) -> None:
        """Read on to the end, or so far that a browser which sends more is to be cut off."""
        spilt = 0
        try:
            while spilt < _SPILL and (part := await self._next()):
                spilt += len(part)
        except Refused:  # it has ended already
            pass

    async def _next(self) -> bytes:
        try:
            with anyio.fail_after(_SILENCE):
                async for part in self._parts:
                    if part:
                        return part
        except TimeoutError:
            raise Refused(400, f"no bytes arrived for {_SILENCE:.0f} s; send the archive again") from None
        except ClientDisconnect:
            raise Refused(400, "the connection ended within the archive; send it again") from None
        return b""


def _limiter_of(request: Request) -> CapacityLimiter:
    """Return the limit of archives that arrive at a time in this app."""
    state = request.app.state
    if not hasattr(state, "arriving_archives"):
        state.arriving_archives = CapacityLimiter(_AT_ONCE)
    limiter: CapacityLimiter = state.arriving_archives
    return limiter


def _uploaded(request: Request, job: Job) -> Response:
    place = f"/jobs/{job.id}"
    return RedirectResponse(place, 303) if _is_page(request) else JSONResponse({"location": place}, 201)


def _is_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
