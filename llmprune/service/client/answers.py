"""Answers of a service as the client reads them: limited in size and checked against the fields that it needs.

Anything can answer at an address: a proxy's page, another program, a service of another version. An answer that cannot
be read raises ServiceError with the address and what came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, TypeVar, cast

import httpx2 as httpx
from pydantic import TypeAdapter, ValidationError

from llmprune.common.errors import (
    AccessDenied,
    LLMPruneError,
    NotFound,
    RecipeError,
    ServiceBusy,
    ServiceError,
    StateConflict,
)
from llmprune.common.schema import format_size

BODY_LIMIT = 32 * 10**6  # bytes of an answer; a page of 500 jobs, each with a long error, has about 12 MB
_MAX_QUOTE = 200  # characters quoted of an answer that cannot be read
_MAX_MESSAGE = 2_000  # characters of a message of the service that are passed on


_KINDS: dict[int, type[ServiceError]] = {
    401: AccessDenied, 403: AccessDenied, 404: NotFound, 409: StateConflict,
    429: ServiceBusy, 503: ServiceBusy, 507: ServiceBusy,
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    method: str
    url: str
    status: int
    headers: httpx.Headers
    body: bytes

    @classmethod
    def head(cls, response: httpx.Response) -> Self:
        """Return an answer without its body. Raises ServiceError for a compressed body, which was not asked for."""
        request = response.request
        head = cls(request.method, str(request.url), response.status_code, response.headers, b"")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise head.unreadable(f"the compression {response.headers['Content-Encoding'][:_MAX_QUOTE]!r}")
        return head

    def json(self, shape: type[T]) -> T:
        """Return the body as a value of a type. Raises ServiceError where it is not JSON, or does not fit the type.

        Fields that the type does not have are left out: a later version of the service may send more.
        """
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise self.unreadable(self._described()) from None
        try:
            found: T = _adapter(cast(Hashable, shape)).validate_python(value, extra="ignore")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part)[:60] for part in first["loc"]) or "its value"
            raise self.unreadable(f"JSON that does not fit ({place}: {first['msg']})") from None
        return found

    def text(self) -> str:
        """Return the body as text."""
        return self.body.decode("utf-8", "replace")

    def next_offset(self) -> int:
        """Return the offset of a log's next part. Raises ServiceError where the answer has none."""
        after = self.headers.get("X-Next-Offset", "")
        if not re.fullmatch(r"\d{1,19}", after, re.ASCII):
            raise self.unreadable("no X-Next-Offset")
        return int(after)

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
        refusal = _KINDS.get(self.status, ServiceError)(f"the service refused: {detail}{hint}")
        refusal.status = self.status
        return refusal

    def unreadable(self, got: str) -> ServiceError:
        """Return the error for an answer that no service of this version gives; ``got`` describes it."""
        unreadable = ServiceError(
            f"{self.method} {self.url} answered {self.status} with {got}: that is no answer of this version of "
            "llmprune serve; check --server, and any proxy in between"
        )
        unreadable.status = self.status
        return unreadable

    def _described(self) -> str:
        """Describe the body, such as ``text/html, 310 bytes that begin '<html>'``."""
        kind = self.headers.get("Content-Type", "no content type")[:_MAX_QUOTE]
        location = self.headers.get("Location", "")[:_MAX_QUOTE]
        if not self.body:
            return f"{kind} and no body" + (f", and redirects to {location}" if location else "")
        begin = self.body[: 4 * _MAX_QUOTE].decode("utf-8", "replace")[:_MAX_QUOTE]
        return f"{kind}, {len(self.body):,} bytes that begin {begin!r}"


class SizeLimit:
    """Counter of an answer's bytes. ``limit``: maximum number; a part above it raises ServiceError."""

    def __init__(self, response: httpx.Response, limit: int) -> None:
        self._response, self._limit, self.size = response, limit, 0

    def passed(self, part: bytes) -> bytes:
        """Count a part and return it."""
        self.size += len(part)
        if self.size > self._limit:
            raise Answer.head(self._response).unreadable(f"more than {format_size(self._limit)}")
        return part


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
