"""Authentication and request limits: a middleware that every request passes first.

- Without any user, requests are accepted only on loopback and only under loopback's own names, because a foreign name
  that resolves to this address is DNS rebinding.
- With users: ``Authorization: Bearer`` or the cookie of a browser session. Role and scopes allow the request or not
  (``route_scopes``).
- A request that changes something is refused where the browser reports that another site sent it.
- Each caller has a limit on requests per second and on concurrent requests; addresses that send wrong tokens have a
  lower one. Health, readiness and metrics are exempt, so that they are answered when nothing else is.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from urllib.parse import SplitResult, quote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmprune.service.api.access.rate_limit import ConcurrencyLimit, RateLimit, network_of
from llmprune.service.api.access.route_scopes import PUBLIC, refusal_of
from llmprune.service.api.error_responses import Failure, problem_response, respond, table_failure
from llmprune.service.database.database import DatabaseError, DatabaseUnavailable
from llmprune.service.settings import LOOPBACK, Settings, is_loopback
from llmprune.service.users.sessions import Sessions
from llmprune.service.users.tokens import LOCAL, AccessEnded, Caller, Tokens
from llmprune.service.users.users import Users

COOKIE = "llmprune_session"
FLOW_COOKIE = "llmprune_sign_in"  # of a sign-in under way at the OpenID provider
CALLBACK = "/login/oidc/callback"
_HEALTH = "/v1/health"
_PROBES = (_HEALTH, "/v1/ready", "/v1/metrics")
_COOKIE_VALUE = re.compile(r"[\w.~-]{1,1000}", re.ASCII)
_SEEN_EVERY = 300.0  # seconds between two records of a caller's last request
_SEEN_WAIT = 0.5  # seconds that a request waits for such a record
_STREAM = re.compile(r"/v1/jobs/[^/]+/events")
_MAX_PARAMETERS = 200
_MAX_SEEN = 10_000  # callers
_SAFE = ("GET", "HEAD", "OPTIONS")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class AuthMiddleware:
    """ASGI middleware that sets ``request.state.caller``, None for a public address."""

    def __init__(self, app: ASGIApp, settings: Settings, *, tokens: Tokens) -> None:
        self.app, self.settings, self.tokens = app, settings, tokens
        self.users, self.sessions = Users(tokens.database), Sessions(tokens.database)
        self._seen: dict[tuple[str, str | None], float] = {}  # time.monotonic() of the last record, by caller
        self._requests = RateLimit(settings.rate, settings.burst)
        self._wrong_tokens = RateLimit(0.5, 10)
        self._failed_sign_ins = RateLimit(0.5, 10)
        self._concurrency = ConcurrencyLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI
        """Pass a request on, or answer it with the reason for its refusal."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        _drop_foreign_cookies(scope)
        refusal = await self._checked(scope)
        send = _with_headers(send)
        if refusal or scope["path"] in _PROBES:
            await (refusal or self.app)(scope, receive, send)
            return None
        await self._record_seen(scope["state"]["caller"])
        if _is_sign_in(scope):
            send = self._counting_failures(network_of(_address(scope)), send)
        with self._concurrency.counted(self._concurrent_limits(scope)) as is_allowed:
            await (self.app if is_allowed else _too_many_at_once(scope))(scope, receive, send)
        return None

    def _concurrent_limits(self, scope: Scope) -> dict[str, int]:
        """Return how many requests of this kind may be answered at a time, by the keys under which they are counted."""
        settings, caller = self.settings, scope["state"]["caller"]
        address, token = f"address {network_of(_address(scope))}", f"token {caller.name if caller else None}"
        if _STREAM.fullmatch(scope["path"]):
            limits = {f"streams of {address}": 2 * settings.streams, "streams": 8 * settings.streams}
            return limits | {f"streams of {token}": settings.streams}
        limits = {address: 2 * settings.requests}
        return limits | {token: settings.requests} if caller else limits

    def _counting_failures(self, network: str, send: Send) -> Send:
        """Uncount a sign-in that succeeds. Each is counted on arrival, because many may arrive at once."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] not in (401, 403):
                self._failed_sign_ins.give_back(network)
            await send(message)

        return sending

    async def _checked(self, scope: Scope) -> Response | None:
        """Return the response to a refused request. A database server is asked in a thread, for it may be slow."""
        try:
            if self.settings.database_url is None:
                return self._refusal(scope)
            return await run_in_threadpool(self._refusal, scope)
        except DatabaseUnavailable as error:
            scope.setdefault("state", {})["caller"] = None
            return None if scope["path"] == _HEALTH else respond(Request(scope), table_failure(error))

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the response to a refused request; None where the request is accepted. Sets the caller."""
        headers, path = Headers(scope=scope), scope["path"]
        is_open, ended = self.is_open(), None
        try:
            caller = LOCAL if is_open else self._caller(headers)
        except AccessEnded as error:
            caller, ended = None, error
        if is_open and not self._is_known_host(headers.get("host", "")):
            message = "this name is not the service's; call it by 127.0.0.1, or give serve --host-name"
            return problem_response(Failure(403, message))
        scope.setdefault("state", {})["caller"] = caller
        if "transfer-encoding" in headers:
            return problem_response(Failure(411, "send the length of the body (Content-Length), not chunks"))
        if scope["query_string"].count(b"&") > _MAX_PARAMETERS:
            return problem_response(Failure(422, f"a request has at most {_MAX_PARAMETERS} query parameters"))
        if caller and (reason := refusal_of(caller, scope["method"], path)):
            return respond(Request(scope), Failure(403, reason))
        if path in _PROBES and (caller or path in PUBLIC):
            return None
        return self._rate_refusal(scope, caller, ended=ended)

    def _rate_refusal(self, scope: Scope, caller: Caller | None, *, ended: AccessEnded | None) -> Response | None:
        """Refuse a request above a rate, from another site, or without a token; None where it is accepted."""
        headers, path, network = Headers(scope=scope), scope["path"], network_of(_address(scope))
        wait = self._requests.wait(f"token {caller.name}" if caller else network)
        if caller is None and headers.get("authorization"):
            wait = max(wait, self._wrong_tokens.wait(network))
        if not wait and scope["method"] not in _SAFE and _from_another_site(headers):
            return problem_response(Failure(403, "another site asked for this; only this service's own pages may"))
        if not wait and _is_sign_in(scope):
            wait = self._failed_sign_ins.wait(network)
        if wait:
            return _too_many(scope, wait)
        if ended is not None:
            return problem_response(Failure(ended.status, str(ended), headers={"WWW-Authenticate": "Bearer"}))
        if caller is None and not (path in PUBLIC or path.startswith("/static/")):
            return _sign_in_first(headers, path)
        return None

    def is_open(self) -> bool:
        """Return whether nobody has to sign in: on loopback, as long as there is no user and no OpenID provider."""
        return is_loopback(self.settings.host) and self.settings.oidc is None and not self.users.exist()

    async def _record_seen(self, caller: Caller | None) -> None:
        """Record the caller's request, once in a while, because each record waits for the disk."""
        if caller is None or caller == LOCAL:
            return
        key, now = (caller.name, caller.token), time.monotonic()
        if now - self._seen.get(key, float("-inf")) < _SEEN_EVERY:
            return
        if len(self._seen) > _MAX_SEEN:
            self._seen.clear()
        self._seen[key] = now
        # a full disk or a long transaction must not keep requests waiting that only read
        with suppress(DatabaseError, DatabaseUnavailable, TimeoutError):
            await asyncio.wait_for(run_in_threadpool(self.users.touch, caller.name, caller.token), _SEEN_WAIT)

    def _caller(self, headers: Headers) -> Caller | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme:
            return self.tokens.caller(token.strip()) if scheme.lower() == "bearer" else None
        session = session_of(headers)
        return self.sessions.caller(session) if session else None

    def _is_known_host(self, host: str) -> bool:
        name = _parts(f"//{host}").hostname if _is_plain(host) else None
        return name in (*LOOPBACK, self.settings.host, *self.settings.host_names)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "?"


def session_of(headers: Headers) -> str | None:
    """Return the secret of the session in a browser's cookie."""
    return cookie_of(headers, COOKIE)


def cookie_of(headers: Headers, wanted: str) -> str | None:
    """Return the value of a cookie of this service; None where there is none, or one that it never set."""
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == wanted:
            return value if _COOKIE_VALUE.fullmatch(value) else None
    return None


def _is_sign_in(scope: Scope) -> bool:
    """Return whether a request tries to sign in."""
    path: str = scope["path"]
    return path == CALLBACK or (path == "/login" and scope["method"] == "POST")


def _drop_foreign_cookies(scope: Scope) -> None:
    """Remove all cookies but the service's, because Starlette's parser may take quadratic time to unquote them."""
    headers = Headers(scope=scope)
    if "cookie" in headers:
        found = {name: value for name in (COOKIE, FLOW_COOKIE) if (value := cookie_of(headers, name))}
        kept = "; ".join(f"{name}={value}" for name, value in found.items())
        own = [(b"cookie", kept.encode())] if kept else []
        scope["headers"] = [(name, value) for name, value in headers.raw if name != b"cookie"] + own


def _parts(address: str) -> SplitResult:
    """Split an address; return empty parts where it is not valid."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _is_plain(host: str) -> bool:
    return bool(host) and not set(host) & set("/@?#\\ ")


def _from_another_site(headers: Headers) -> bool:
    """Return whether another site sent a request: by Sec-Fetch-Site, or by Origin for browsers that do not send it."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and _parts(origin).netloc != headers.get("host")


def _sign_in_first(headers: Headers, path: str) -> Response:
    """Ask for a token: 401 for a program, a redirect to the sign-in page for htmx or a browser."""
    if "hx-request" in headers:  # htmx stops polling and shows the sign-in page
        here = _parts(headers.get("hx-current-url", "")).path or "/"
        return Response(status_code=401, headers={"HX-Redirect": f"/login?next={quote(here)}"})
    if path.startswith("/v1") or "text/html" not in headers.get("accept", ""):
        message = "send Authorization: Bearer TOKEN"
        if headers.get("authorization"):
            message = "no such token here: it was revoked, or its user deleted; make another on the Account page"
        return problem_response(Failure(401, message, headers={"WWW-Authenticate": "Bearer"}))
    return RedirectResponse(f"/login?next={quote(path)}", 303)


def _too_many(scope: Scope, wait: float) -> Response:
    message = f"too many requests; wait {wait:.1f} s"
    return respond(Request(scope), Failure(429, message, headers={"Retry-After": str(int(wait) + 1)}))


def _too_many_at_once(scope: Scope) -> Response:
    message = "too many requests or event streams of yours are under way; end some, or wait for their answers"
    return respond(Request(scope), Failure(429, message, headers={"Retry-After": "5"}))


def _with_headers(send: Send) -> Send:
    """Add the security headers to every response that does not set them itself."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
