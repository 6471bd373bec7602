"""ASGI middleware that writes every request to the access log, and every attempt to change something to the audit log.

It handles requests of every route, so a new route cannot be forgotten.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmprune.service import logs
from llmprune.service.api.access.auth import CALLBACK
from llmprune.service.api.access.rate_limit import RateLimit, network_of
from llmprune.service.api.monitoring.metrics import METHODS

_PROBES = ("/v1/health", "/v1/ready")
_SAFE = ("GET", "HEAD", "OPTIONS", "other")  # other: a method without a route
_REFUSED = (400, 401, 403, 404, 405, 411, 429)
_MAX_TEXT = 200  # characters of a text that a client chooses
_READ_ONLY_POSTS = ("/v1/recipes/", "/submit/")  # they change nothing


class RequestsLogMiddleware:
    """Logs how each request was answered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._refusals = RateLimit(1.0, 50)  # lines of the access log: a flood must not push out earlier lines
        self._attempts = RateLimit(1 / 6, 20)  # lines of the audit log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI
        """Pass a request on, and log its answer once it is complete."""
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
        except Exception:  # Starlette answers it outside of this middleware
            answered["status"] = answered["status"] or 500
            raise
        finally:
            self._write(scope, answered, seconds=time.monotonic() - start)
        return None

    def _write(self, scope: Scope, answered: dict[str, Any], *, seconds: float) -> None:
        caller, address = scope.get("state", {}).get("caller"), scope["client"][0] if scope.get("client") else "?"
        who = {"address": address[:_MAX_TEXT], "caller": caller.name if caller else None}
        method = scope["method"] if scope["method"] in METHODS else "other"
        path, status = scope["path"], answered["status"]
        if status not in _REFUSED or not self._refusals.wait(network_of(address)):
            shown = scope.get("raw_path", path.encode())[:_MAX_TEXT].decode("latin-1")  # escaped by the client
            figures = {"status": status, "bytes": answered["bytes"], "ms": round(1000 * seconds, 1)}
            logs.access.info(logs.record(**who, method=method, path=shown, **figures))
        changes = method not in _SAFE and not path.startswith(_READ_ONLY_POSTS) and (caller or path == "/login")
        changes = changes or path == CALLBACK
        sampled = caller is None or status == 429  # unlimited in number
        if changes and not (sampled and self._attempts.wait(caller.name if caller else network_of(address))):
            action = f"{method} {getattr(scope.get('route'), 'path', path)}"
            job = scope.get("path_params", {}).get("job", "")[:_MAX_TEXT] or None
            location = answered["location"][:_MAX_TEXT]
            line = who | {"action": action[:_MAX_TEXT], "job": job, "status": status, "location": location}
            if user := scope.get("path_params", {}).get("user"):
                line["user"] = user[:_MAX_TEXT]
            if details := scope.get("state", {}).get("audit"):
                line["details"] = details
            logs.audit.info(logs.record(**line))
