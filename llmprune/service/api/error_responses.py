"""Errors over HTTP: RFC 9457 problem details, for every way in which a request can fail."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from llmprune.common.errors import MOST_PROBLEMS, LLMPruneError, RecipeError, shortened
from llmprune.service.api.server_paths import Paths
from llmprune.service.jobs.store_reads import Conflict, NoSuchJob, QueueFull
from llmprune.service.planner.queue import PlannerBusy, TooManyPlans

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """What went wrong, and every mistake in what was sent."""

    title: str
    status: int
    detail: str = ""
    problems: list[str] = Field([], description="One sentence for each mistake in a recipe or in the parameters.")


class Refused(HTTPException):
    """A request that cannot be done, with the reason and the remedy."""


def answer(
    status: int, detail: str, *, problems: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A problem as a response."""
    title = _TITLES.get(status, "error")
    problem = Problem(title=title, status=status, detail=detail, problems=list(problems))
    return JSONResponse(problem.model_dump(), status, headers, MEDIA_TYPE)


_TITLES = {
    400: "bad request", 401: "no valid token", 403: "not allowed", 404: "not there", 405: "method not allowed",
    409: "conflict", 411: "no length", 413: "too large", 415: "unsupported media type",
    422: "wrong recipe or parameters", 429: "too many", 500: "error in the service", 503: "not now", 507: "no room",
}  # fmt: skip


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that an operation can answer with, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _TITLES[status], "content": content} for status in (400, 401, 403, 429, *statuses)}


def install(app: FastAPI) -> None:
    """Have the app answer its exceptions as problems."""
    for kind, explain in _EXPLAINED.items():
        app.add_exception_handler(kind, _handler(explain))


def respond(
    request: Request,
    status: int,
    *,
    detail: str,
    problems: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A page where a person asked for one, else a problem."""
    if request.url.path.startswith("/v1") or "text/html" not in request.headers.get("accept", ""):
        return answer(status, detail, problems=problems, headers=headers)
    page: Response = request.app.state.error_page(request, status, _TITLES.get(status, "error"), detail, problems)
    page.headers.update(headers or {})
    return page


Explained = tuple[int, str, Sequence[str], Mapping[str, str]]


def _handler(explain: Callable[[Any], Explained]) -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        status, detail, problems, headers = explain(error)
        paths: Paths = request.app.state.service.paths
        detail, problems = paths.hide(detail), [paths.hide(problem) for problem in problems]
        if status == 405:
            headers = {"Allow": ", ".join(_methods(request))}
        return respond(request, status, detail=detail, problems=problems, headers=headers)

    return handle


def _methods(request: Request) -> list[str]:
    """What may be done at a request's address, by all its routes; Starlette's own Allow names those of one."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _parameters(error: RequestValidationError) -> Explained:
    errors = error.errors()
    said = [
        f"{'.'.join(str(part)[:60] for part in one['loc'][1:])}: {one['msg']}" for one in errors[: MOST_PROBLEMS + 1]
    ]
    return 422, "the parameters are wrong", shortened(said, len(errors)), {}


def _wrong(error: RecipeError) -> Explained:
    wishes = {
        "push": "the push cannot be done",
        "submission": "the job cannot be queued",
        "evaluation": "more samples cannot be evaluated",
    }
    return 422, wishes.get(error.source, "the recipe cannot be run here"), error.problems, {}


def _table(error: sqlite3.OperationalError) -> Explained:
    full = "full" in str(error) or "I/O" in str(error)
    return 507 if full else 503, f"the job table cannot be written: {error}", (), {"Retry-After": "10"}


_EXPLAINED: dict[type[Exception], Callable[[Any], Explained]] = {
    RecipeError: _wrong,
    RequestValidationError: _parameters,
    HTTPException: lambda error: (error.status_code, str(error.detail), (), error.headers or {}),
    Conflict: lambda error: (409, str(error), (), {}),
    QueueFull: lambda error: (429, str(error), (), {"Retry-After": "60"}),
    TooManyPlans: lambda error: (429, str(error), (), {"Retry-After": str(math.ceil(error.wait))}),
    PlannerBusy: lambda error: (503, str(error), (), {"Retry-After": str(math.ceil(error.wait))}),
    LLMPruneError: lambda error: (500, str(error), (), {}),
    NoSuchJob: lambda error: (404, str(error), (), {}),
    sqlite3.OperationalError: _table,
    OSError: lambda error: (507, f"the disk cannot be used: {error.strerror or error}", (), {"Retry-After": "10"}),
}
