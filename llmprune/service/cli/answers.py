"""Answers of a service as the client reads them: limited in size and checked against the fields that it needs.

Anything can answer at an address: a proxy's page, another program, a service of another version. An answer that cannot
be read raises ServiceError with the address and what came.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import httpx2 as httpx
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.common.schema import format_size

BODY_LIMIT = 32 * 10**6  # bytes of an answer; a page of 500 jobs, each with a long error, has about 12 MB
_MAX_QUOTE = 200  # characters quoted of an answer that cannot be read
_MAX_MESSAGE = 2_000  # characters of a message of the service that are passed on


class ServiceError(LLMPruneError):
    """The service refused a request, cannot be reached, or its answer cannot be read."""


class _Answered(BaseModel):
    """The fields that the client reads. A service of another version may send more."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class SubmittedJob(_Answered):
    """Answer to a submission."""

    id: str


class ChangedJob(_Answered):
    """Answer to the cancellation or retry of a job."""

    state: str


class _Figures(_Answered):
    retention: float | Literal["Infinity", "-Infinity", "NaN"] | None = None  # JSON has no infinity


class _Published(_Answered):
    files: int
    url: str


class ShownJob(_Answered):
    """One job with its state and result."""

    state: str
    ran_seconds: float
    exit_code: int | None
    error: str | None
    finished: float | None = None
    published: _Published | None = None


class _ListedJob(_Answered):
    id: str
    state: str
    name: str
    owner: str
    fraction: float
    ran_seconds: float
    figures: _Figures | None


class Page(_Answered):
    """A page of jobs."""

    jobs: list[_ListedJob]


class Event(_Answered):
    """A change of a job."""

    state: str
    step: str | None
    done: int | None
    total: int | None
    fraction: float
    seconds_left: float | None = None
    run_seconds_left: float | None = None
    detail: str | None = None


class File(_Answered):
    """A file that a job's run wrote."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    method: str
    url: str
    status: int
    headers: httpx.Headers
    body: bytes

    @classmethod
    def read(cls, response: httpx.Response) -> Self:
        """Read a streamed answer. Raises ServiceError above ``BODY_LIMIT`` bytes, and httpx.TransportError."""
        head = cls.head(response)
        return cls(head.method, head.url, head.status, head.headers, b"".join(limited(response, BODY_LIMIT)))

    @classmethod
    def head(cls, response: httpx.Response) -> Self:
        """Return an answer without its body. Raises ServiceError for a compressed body, which was not asked for."""
        request = response.request
        head = cls(request.method, str(request.url), response.status_code, response.headers, b"")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise head.unreadable(f"the compression {response.headers['Content-Encoding'][:_MAX_QUOTE]!r}")
        return head

    def json(self, shape: Any) -> Any:
        """Return the JSON value. Raises ServiceError where the body is not JSON or does not have the type ``shape``."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise self.unreadable(self._described()) from None
        try:
            TypeAdapter(shape).validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part)[:60] for part in first["loc"]) or "its value"
            raise self.unreadable(f"JSON that does not fit ({place}: {first['msg']})") from None
        return value

    def refusal(self) -> LLMPruneError:
        """Return the error that an answer without success reports."""
        try:
            problem = json.loads(self.body)
            detail, problems = (
                str(problem["detail"])[:_MAX_MESSAGE],
                [str(text)[:_MAX_MESSAGE] for text in problem["problems"]],
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.unreadable(self._described())
        if self.status == 422 and problems:
            return RecipeError(problems, detail)
        hint = "; set LLMPRUNE_TOKEN or give --token-file" if self.status == 401 else ""
        return ServiceError(f"the service refused: {detail}{hint}")

    def unreadable(self, got: str) -> ServiceError:
        """Return the error for an answer that no service of this version gives; ``got`` describes it."""
        return ServiceError(
            f"{self.method} {self.url} answered {self.status} with {got}: that is no answer of this version of "
            "llmprune serve; check --server, and any proxy in between"
        )

    def _described(self) -> str:
        """Describe the body, such as ``text/html, 310 bytes that begin '<html>'``."""
        kind = self.headers.get("Content-Type", "no content type")[:_MAX_QUOTE]
        location = self.headers.get("Location", "")[:_MAX_QUOTE]
        if not self.body:
            return f"{kind} and no body" + (f", and redirects to {location}" if location else "")
        begin = self.body[: 4 * _MAX_QUOTE].decode("utf-8", "replace")[:_MAX_QUOTE]
        return f"{kind}, {len(self.body):,} bytes that begin {begin!r}"


def limited(response: httpx.Response, limit: int) -> Iterator[bytes]:
    """Read an answer's body part by part. Raises ServiceError above ``limit`` bytes."""
    size = 0
    for part in response.iter_bytes():
        size += len(part)
        if size > limit:
            raise Answer.head(response).unreadable(f"more than {format_size(limit)}")
        yield part
