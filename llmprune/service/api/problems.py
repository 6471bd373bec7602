"""Errors over HTTP: RFC 9457 problem details, for every way in which a request can fail."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llmprune.errors import LLMPruneError, RecipeError
from llmprune.service.planner import PlannerBusy
from llmprune.service.table import Conflict, QueueFull

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
    status: int, detail: str, problems: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A problem as a response."""
    title = _TITLES.get(status, "error")
    problem = Problem(title=title, status=status, detail=detail, problems=list(problems))
    return JSONResponse(problem.model_dump(), status, headers, MEDIA_TYPE)


_TITLES = {
    400: "bad request", 401: "no valid token", 403: "not allowed", 404: "not there", 405: "method not allowed",
    409: "conflict", 413: "too large", 415: "unsupported media type", 422: "wrong recipe or parameters",
    429: "too many", 500: "error in the service", 503: "not now", 507: "no room",
}  # fmt: skip


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that an operation can answer with, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _TITLES[status], "content": content} for status in (400, 401, 403, 429, *statuses)}


def install(app: FastAPI) -> None:
    """Have the app answer its exceptions as problems."""

    @app.exception_handler(RecipeError)
    def _recipe(_: Request, error: RecipeError) -> Response:
        return answer(422, "the recipe cannot be run here", error.problems)

    @app.exception_handler(RequestValidationError)
    def _request(_: Request, error: RequestValidationError) -> Response:
        said = [f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in error.errors()]
        return answer(422, "the parameters are wrong", said)

    @app.exception_handler(HTTPException)
    def _http(_: Request, error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Conflict)
    def _conflict(_: Request, error: Conflict) -> Response:
        return answer(409, str(error))

    @app.exception_handler(QueueFull)
    def _full(_: Request, error: QueueFull) -> Response:
        return answer(429, str(error), headers={"Retry-After": "60"})

    @app.exception_handler(PlannerBusy)
    def _busy(_: Request, error: PlannerBusy) -> Response:
        return answer(503, str(error), headers={"Retry-After": "60"})

    @app.exception_handler(LLMPruneError)
    def _failed(_: Request, error: LLMPruneError) -> Response:
        return answer(500, str(error))

    @app.exception_handler(sqlite3.OperationalError)
    def _disk(_: Request, error: sqlite3.OperationalError) -> Response:
        full = "full" in str(error) or "I/O" in str(error)
        return answer(507 if full else 503, f"the job table cannot be written: {error}", headers={"Retry-After": "10"})

    @app.exception_handler(OSError)
    def _system(_: Request, error: OSError) -> Response:
        return answer(507, f"the disk cannot be used: {error.strerror or error}", headers={"Retry-After": "10"})
