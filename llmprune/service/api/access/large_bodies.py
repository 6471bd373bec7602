"""Problem details for request bodies above a route's limit, which FastAPI answers in plain text."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.types import Message, Receive, Scope, Send

from llmprune.common.schema import format_size
from llmprune.service.api.error_responses import Failure, respond


class ProblemsOfLargeBodies(FastAPI):
    """An app that answers such bodies like every other error. Its limits lie outside all middleware that is added."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI
        """Answer a request."""
        replaced = False

        async def sending(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 413:
                replaced = Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain")
                if replaced:
                    await respond(Request(scope), _failure(scope))(scope, receive, send)
            if not replaced:
                await send(message)

        await super().__call__(scope, receive, sending)


def _failure(scope: Scope) -> Failure:
    """Return the failure with the body's size, where the request states it, and the limit of its address."""
    stated, most = Headers(scope=scope).get("content-length", ""), scope[MAX_BODY_SIZE_SCOPE_KEY]
    size = f"has {int(stated):,} bytes" if stated.isdecimal() and len(stated) < 20 else "is too large"
    return Failure(
        413,
        f"the body of the request {size}; this address takes at most {most:,} ({format_size(most)}): shorten the texts "
        "and lists in it",
    )
