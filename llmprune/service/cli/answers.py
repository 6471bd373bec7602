"""Answers of a service as a client reads them: within limits, and of the shape that the client goes on with.

Anything can answer at an address: a proxy's page, another program, a service of another version. What makes no sense
becomes a ServiceError with the address and what came.
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
LINE_LIMIT = 10**6  # bytes of a line of an event stream
_SHOWN = 200  # characters of a foreign answer that are quoted
_SAID = 2_000  # characters of the service's own sentences that are passed on


class ServiceError(LLMPruneError):
    """The service said no, cannot be reached, or its answer makes no sense."""


class _Shape(BaseModel):
    """The fields that a client reads. A service of another version may send more."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Submitted(_Shape):
    """A job that was queued."""

    id: str


class Changed(_Shape):
    """A job that was cancelled or queued again."""

    state: str


class _Figures(_Shape):
    retention: float | Literal["Infinity", "-Infinity", "NaN"] | None = None  # JSON has no infinity


class _Published(_Shape):
    files: int
    url: str


class Shown(_Shape):
    """A job that is looked at."""

    state: str
    ran_seconds: float
    exit_code: int | None
    error: str | None
    finished: float | None = None
    published: _Published | None = None


class _Listed(_Shape):
    id: str
    state: str
    name: str
    owner: str
    fraction: float
    ran_seconds: float
    figures: _Figures | None


class Page(_Shape):
    """A page of jobs."""

    jobs: list[_Listed]


class Event(_Shape):
    """A change of a job."""

    state: str
    step: str | None
    done: int | None
    total: int | None
    fraction: float
    seconds_left: float | None = None


class File(_Shape):
    """A file that a job's run wrote."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Answer:
    """An answer that was read whole."""

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
        """Return an answer without its body. Raises ServiceError where the body is compressed, which was not asked."""
        request = response.request
        head = cls(request.method, str(request.url), response.status_code, response.headers, b"")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise head.makes_no_sense(f"the compression {response.headers['Content-Encoding'][:_SHOWN]!r}")
        return head

    def json(self, shape: Any) -> Any:
        """Return the JSON value. Raises ServiceError where it is none, or does not fit the type ``shape``."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise self.makes_no_sense(self._described()) from None
        try:
            TypeAdapter(shape).validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part)[:60] for part in first["loc"]) or "its value"
            raise self.makes_no_sense(f"JSON that does not fit ({place}: {first['msg']})") from None
        return value

    def refusal(self) -> LLMPruneError:
        """Return an answer that is no success as the error that it tells of."""
        try:
            problem = json.loads(self.body)
            detail, problems = str(problem["detail"])[:_SAID], [str(one)[:_SAID] for one in problem["problems"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.makes_no_sense(self._described())
        if self.status == 422 and problems:
            return RecipeError(problems, detail)
        hint = "; set LLMPRUNE_TOKEN or give --token-file" if self.status == 401 else ""
        return ServiceError(f"the service refused: {detail}{hint}")

    def makes_no_sense(self, got: str) -> ServiceError:
        """Return the error of an answer that no service gives."""
        return ServiceError(
            f"{self.method} {self.url} answered {self.status} with {got}: that is no answer of this version of "
            "llmprune serve; check --server, and any proxy in between"
        )

    def _described(self) -> str:
        """``text/html, 310 bytes that begin '<html>'``."""
        kind = self.headers.get("Content-Type", "no content type")[:_SHOWN]
        location = self.headers.get("Location", "")[:_SHOWN]
        if not self.body:
            return f"{kind} and no body" + (f", and leads to {location}" if location else "")
        begin = self.body[: 4 * _SHOWN].decode("utf-8", "replace")[:_SHOWN]
        return f"{kind}, {len(self.body):,} bytes that begin {begin!r}"


def limited(response: httpx.Response, limit: int) -> Iterator[bytes]:
    """Read an answer's body, part by part. Raises ServiceError above ``limit`` bytes."""
    size = 0
    for part in response.iter_bytes():
        size += len(part)
        if size > limit:
            raise Answer.head(response).makes_no_sense(f"more than {format_size(limit)}")
        yield part


def lines_of(response: httpx.Response) -> Iterator[str]:
    """Read a streamed answer line by line. Raises ServiceError where a line is longer than ``LINE_LIMIT`` bytes."""
    pending: list[bytes] = []
    size = 0
    for part in response.iter_bytes():
        *whole, rest = part.split(b"\n")
        for line in whole:
            yield b"".join([*pending, line]).rstrip(b"\r").decode("utf-8", "replace")
            pending, size = [], 0
        pending.append(rest)
        size += len(rest)
        if size > LINE_LIMIT:
            raise Answer.head(response).makes_no_sense(f"a line of more than {format_size(LINE_LIMIT)}")
