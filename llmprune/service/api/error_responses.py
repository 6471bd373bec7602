"""Error responses: RFC 9457 problem details for programs, pages for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from llmprune.common.errors import MOST_PROBLEMS, LLMPruneError, RecipeError, shortened
from llmprune.service.api.access.server_paths import ServerPaths
from llmprune.service.database.database import DatabaseUnavailable
from llmprune.service.jobs.job import JOB_ID
from llmprune.service.jobs.library.library import NoSuchPage
from llmprune.service.jobs.store_reads import Conflict, NoSuchJob, QueueFull
from llmprune.service.planner.queue import PlannerBusy, TooManyPlans

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """Reason for a failed request."""

    title: str
    status: int
    detail: str = ""
    problems: list[str] = Field([], description="One sentence for each mistake in the recipe or in the parameters.")


class Refused(HTTPException):
    """The request is refused, with the reason and the remedy."""


@dataclass(frozen=True)
class Failure:
    """Contents of an error response."""

    status: int
    detail: str
    problems: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Short title of the status."""
        return _TITLES.get(self.status, "error")


def problem_response(failure: Failure) -> JSONResponse:
    """Return a failure as problem details."""
    problem = Problem(
        title=failure.title, status=failure.status, detail=failure.detail, problems=list(failure.problems)
    )
    return JSONResponse(problem.model_dump(), failure.status, failure.headers, MEDIA_TYPE)


_TITLES = {
    400: "bad request", 401: "no valid token", 403: "not allowed", 404: "not found", 405: "method not allowed",
    409: "conflict", 411: "length required", 413: "too large", 415: "unsupported media type", 416: "no such range",
    422: "wrong recipe or parameters", 429: "too many requests", 500: "error in the service", 503: "unavailable",
    507: "no space left",
}  # fmt: skip


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an operation, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _TITLES[status], "content": content} for status in (400, 401, 403, 429, *statuses)}


def install(app: FastAPI) -> None:
    """Convert the exceptions of the app to error responses."""
    for kind, explain in _EXPLAINED.items():
        app.add_exception_handler(kind, _handler(explain))


def respond(request: Request, failure: Failure) -> Response:
    """Return a failure as a page where a browser asked for one, otherwise as problem details."""
    if request.url.path.startswith("/v1") or "text/html" not in request.headers.get("accept", ""):
        return problem_response(failure)
    page: Response = request.app.state.error_page(request, failure)
    page.headers.update(failure.headers)
    return page


def _handler(explain: Callable[[Any], Failure]) -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        failure = explain(error)
        paths: ServerPaths = request.app.state.service.paths
        headers = {"Allow": ", ".join(_methods(request))} if failure.status == 405 else failure.headers
        problems = [paths.hide(problem) for problem in failure.problems]
        return respond(request, Failure(failure.status, paths.hide(failure.detail), problems, headers))

    return handle


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes at a request's address; Starlette's own Allow names those of one route."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


_NO_ID = {"pattern": f"^{JOB_ID}$"}  # in pydantic's error for an id that no job, model, sweep or upload can have


def _wrong_parameters(error: RequestValidationError) -> Failure:
    errors = error.errors()
    absent = next((one for one in errors if one["loc"][0] == "path" and one.get("ctx") == _NO_ID), None)
    if absent is not None:
        name, given = absent["loc"][-1], str(absent["input"])[:60]
        return Failure(404, f"there is no {name} {given!r}: an id is 12 of the digits 0-9 and letters a-f")
    problems = [
        f"{'.'.join(str(part)[:60] for part in one['loc'][1:])}: {one['msg']}" for one in errors[: MOST_PROBLEMS + 1]
    ]
    return Failure(422, "the parameters are wrong", shortened(problems, len(errors)))


def _wrong_recipe(error: RecipeError) -> Failure:
    details = {
        "push": "the push cannot be done",
        "submission": "the job cannot be queued",
        "evaluation": "more samples cannot be evaluated",
        "users": "this cannot be done",
        "labels": "the labels cannot be changed",
        "models": "the models cannot be listed",
        "sweep": "the sweep cannot be made",
        "upload": "the upload cannot be taken",
    }
    return Failure(422, details.get(error.source, "the recipe cannot be run here"), error.problems)


def table_failure(error: DatabaseUnavailable) -> Failure:
    """Return the failure of a request while the database cannot be used."""
    return _busy(507 if error.is_full else 503, error, retry_after=10)


def _disk_error(error: OSError) -> Failure:
    return _busy(507, f"the disk cannot be used: {error.strerror or error}", retry_after=10)


def _busy(status: int, detail: object, *, retry_after: float) -> Failure:
    """Return a failure that may pass. ``retry_after``: seconds after which a retry makes sense."""
    return Failure(status, str(detail), headers={"Retry-After": str(math.ceil(retry_after))})


_EXPLAINED: dict[type[Exception], Callable[[Any], Failure]] = {
    RecipeError: _wrong_recipe,
    RequestValidationError: _wrong_parameters,
    HTTPException: lambda error: Failure(error.status_code, str(error.detail), headers=error.headers or {}),
    Conflict: lambda error: Failure(409, str(error)),
    QueueFull: lambda error: _busy(429, error, retry_after=60),
    TooManyPlans: lambda error: _busy(429, error, retry_after=error.wait),
    PlannerBusy: lambda error: _busy(503, error, retry_after=error.wait),
    LLMPruneError: lambda error: Failure(500, str(error)),
    NoSuchJob: lambda error: Failure(404, str(error)),
    NoSuchPage: lambda error: Failure(404, str(error)),
    DatabaseUnavailable: table_failure,
    OSError: _disk_error,
}
