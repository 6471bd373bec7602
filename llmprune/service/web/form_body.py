"""Parser of form bodies in a worker thread, because Starlette's parser runs on the event loop, byte by byte."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData

from llmprune.service.api.error_responses import Refused

_KIND = "application/x-www-form-urlencoded"
_MAX_FIELDS = 50  # the form with the editor has 28


class FormRequest(Request):
    """A request whose form is urlencoded and has few fields."""

    def form(self, **_: Any) -> Any:
        """Return the fields as FormData, once awaited. Raises Refused (415, 422)."""
        return self._fields()

    async def _fields(self) -> FormData:
        kind = self.headers.get("content-type", _KIND).split(";")[0].strip().lower()
        if kind != _KIND:
            raise Refused(415, f"send a form as {_KIND}")
        return await run_in_threadpool(_parsed, await self.body())


def many(form: FormData, name: str) -> list[str]:
    """Return the values of a field that comes several times, each once."""
    return list(dict.fromkeys(value for value in form.getlist(name) if isinstance(value, str)))


class FormRoute(APIRoute):
    """A route that reads forms as FormRequest does."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """Return the handler, called with a FormRequest."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(FormRequest(request.scope, request.receive))

        return handler


def _parsed(body: bytes) -> FormData:
    try:
        fields = parse_qsl(body.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
        return FormData([*fields])  # a list of texts or files
    except ValueError as error:
        raise Refused(422, f"a form has at most {_MAX_FIELDS} fields") from error
