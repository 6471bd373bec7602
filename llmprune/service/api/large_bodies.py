"""Problem details for request bodies above a route's limit, which FastAPI answers in plain text."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from llmprune.service.api.error_responses import Failure, respond

_REMEDY = "the body of the request is larger than this address takes: send less"


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
                    await respond(Request(scope), Failure(413, _REMEDY))(scope, receive, send)
            if not replaced:
                await send(message)

        await super().__call__(scope, receive, sending)
