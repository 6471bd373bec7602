"""The page of a job's log: its end, which follows a running job, older lines, and a search. All work without script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import Query, Request
from fastapi.responses import Response, StreamingResponse

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.files.outputs import LOG_PART, read_log
from llmprune.service.monitoring.log_lines import Log, LogFilter
from llmprune.service.web.responses import page, page_router

router = page_router()

_LINES = 200  # on one page
_MOST_FOLLOWED = 2_000  # lines that are added to a page, which is then loaded anew
_Place = Annotated[int | None, Query(ge=0, le=2**62)]
_Level = Annotated[Literal["error", "warning", ""], Query()]
_Text = Annotated[str, Query(max_length=200)]


@dataclass(frozen=True)
class _Asked:
    """Choice of lines for a log page: ``q`` and ``level`` select lines; ``before`` and ``since`` are its bytes."""

    job: str
    q: str = ""
    level: Literal["error", "warning", ""] = ""
    follow: bool = True

    @property
    def filter(self) -> LogFilter:
        """Selection of lines."""
        return LogFilter(self.q.strip(), self.level)

    def link(self, path: str = "", **more: Any) -> str:
        """Return the address of a page with the same selection."""
        given = {"q": self.q, "level": self.level, "follow": "" if self.follow else "off"} | more
        query = urlencode({name: value for name, value in given.items() if value not in ("", None)})
        return f"/jobs/{self.job}/log{path}" + (f"?{query}" if query else "")


@router.get("/jobs/{job}/log")
def log_page(
    request: Request,
    job: JobId,
    *,
    service: TheService,
    caller: TheCaller,
    q: _Text = "",
    level: _Level = "",
    before: _Place = None,
    since: _Place = None,
    follow: Annotated[Literal["off", ""], Query()] = "",
) -> Response:
    """Show the last lines of a job's log, or those before or after a place; ``q`` and ``level`` select lines."""
    found = service.job(job, caller)
    log = _log_of(service, job)
    asked = _Asked(job, q, level, follow=not follow)
    if since is not None:
        shown = log.since(since, asked.filter, count=_LINES)
    else:
        end = log.end(whole_lines=not found.ended)
        shown = log.before(end if before is None else min(before, end), asked.filter, count=_LINES)
    is_end = before is None and (since is None or shown.after >= log.end(whole_lines=not found.ended))
    on = asked.link(before=shown.before) if since is None else asked.link(since=shown.after)
    values: dict[str, Any] = {
        "on": on,
        "is_end": is_end,
        "live": is_end and not found.ended,
        "size": log.end(whole_lines=False),
    }
    return page(request, "log", job=service.shown(found), log=shown, asked=asked, added=0, **values)


@router.get("/jobs/{job}/log/more")
def more_lines(
    request: Request,
    job: JobId,
    *,
    service: TheService,
    caller: TheCaller,
    since: Annotated[int, Query(ge=0, le=2**62)] = 0,
    added: Annotated[int, Query(ge=0, le=10**6)] = 0,
    q: _Text = "",
    level: _Level = "",
) -> Response:
    """Return the new lines of the log; 204 where it has none. Once the job has ended, the page is loaded again."""
    found, asked = service.job(job, caller), _Asked(job, q, level)
    shown = _log_of(service, job).since(since, asked.filter, count=_LINES)
    if found.ended or added >= _MOST_FOLLOWED:
        return Response(status_code=200, headers={"HX-Refresh": "true"})
    if shown.after == since:
        return Response(status_code=204)
    return page(request, "log_more", job=found, log=shown, asked=asked, added=added + len(shown.lines))


@router.get("/jobs/{job}/log.txt")
def download_log(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Download the whole log, a part at a time."""
    found = service.job(job, caller)
    headers = {"Content-Disposition": f'attachment; filename="{found.id}.log.txt"'}
    return StreamingResponse(_parts(service, found.id), media_type="text/plain; charset=utf-8", headers=headers)


def _log_of(service: Service, job: str) -> Log:
    def shown(begin: int, end: int) -> bytes:
        return read_log(service, job, offset=begin, size=end - begin)[0]

    return Log(service.settings.log(job), shown)


def _parts(service: Service, job: str) -> Any:
    """Yield the parts of a log until its end."""
    offset = 0
    while True:
        part, after = read_log(service, job, offset=offset, size=LOG_PART)
        if after == offset:
            return
        offset = after
        yield part
