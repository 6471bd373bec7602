"""ASGI middleware that notes every request in the access log, and every attempt to change something in the audit log.

It sees the routes and not their names in the code, so that a new route cannot be forgotten.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmprune.service import logs
from llmprune.service.limits import RateLimit

_PROBES = ("/v1/health", "/v1/ready")
_SAFE = ("GET", "HEAD", "OPTIONS")
_QUESTIONS = ("/v1/recipes/", "/submit/")  # they are posted, and change nothing


class RequestsLog:
    """Notes how each request was answered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._throttled = RateLimit(1 / 60, 3)  # audit lines of refusals for haste: a flood of them is one event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and note its answer once it is complete."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            return await self.app(scope, receive, send)
        start = time.monotonic()
        answered: dict[str, Any] = {"status": 0, "bytes": 0, "location": ""}

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered["status"] = message["status"]
                answered["location"] = Headers(raw=message["headers"]).get("location", "")
            answered["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:  # answered by Starlette, outside of here
            answered["status"] = answered["status"] or 500
            raise
        finally:
            self._note(scope, answered, time.monotonic() - start)
        return None

    def _note(self, scope: Scope, answered: dict[str, Any], seconds: float) -> None:
        caller = scope.get("state", {}).get("caller")
        who = {
            "address": scope["client"][0] if scope.get("client") else None,
            "caller": caller.name if caller else None,
        }
        path, status = scope["path"][:500], answered["status"]
        logs.access.info(
            logs.record(
                **who,
                method=scope["method"],
                path=path,
                status=status,
                bytes=answered["bytes"],
                ms=round(1000 * seconds, 1),
            )
        )
        changes = scope["method"] not in _SAFE and not path.startswith(_QUESTIONS)
        throttled = status == 429 and self._throttled.wait(caller.name if caller else str(who["address"]))
        if changes and (caller or path == "/login") and not throttled:
            action = f"{scope['method']} {getattr(scope.get('route'), 'path', path)}"
            job = scope.get("path_params", {}).get("job")
            logs.audit.info(logs.record(**who, action=action, job=job, status=status, location=answered["location"]))
