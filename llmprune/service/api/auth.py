"""Who may come in: the middleware that every request passes before anything else looks at it.

- Without any token, only on loopback, only under loopback's own names (a foreign name that
  leads here is DNS rebinding).
- With tokens: ``Authorization: Bearer`` or a browser session's cookie.
- What changes something is refused where a browser says that another site asked for it.
- Each caller has a limit of requests a second and of requests at a time; addresses that send wrong tokens a lower one.
  Health, readiness and metrics are outside these limits: they are asked for when nothing else answers.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmprune.service.api.error_responses import answer, respond
from llmprune.service.api.rate_limit import InFlight, RateLimit, network_of
from llmprune.service.jobs.tokens import LOCAL, Caller, Tokens
from llmprune.service.settings import LOOPBACK, Settings, is_loopback

COOKIE = "llmprune_session"
_OPEN = ("/v1/health", "/v1/ready", "/login")
_PROBES = ("/v1/health", "/v1/ready", "/v1/metrics")
_SESSION = re.compile(r"[\w-]{1,100}", re.ASCII)
_STREAM = re.compile(r"/v1/jobs/[^/]+/events")
_MOST_PARAMETERS = 200
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


class Gate:
    """ASGI middleware; puts the caller into ``request.state.caller``."""

    def __init__(self, app: ASGIApp, settings: Settings, *, tokens: Tokens) -> None:
        self.app, self.settings, self.tokens = app, settings, tokens
        self._requests = RateLimit(settings.rate, settings.burst)
        self._mistakes = RateLimit(0.5, 10)  # wrong bearer tokens
        self._sign_ins = RateLimit(0.5, 10)  # that failed
        self._in_flight = InFlight()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI
        """Let a request pass, or answer it here."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        _keep_own_cookie(scope)
        refused = self._refusal(scope)
        guarded = _with_headers(send)
        if refused or scope["path"] in _PROBES:
            await (refused or self.app)(scope, receive, guarded)
            return None
        if scope["path"] == "/login" and scope["method"] == "POST":
            guarded = self._counting_failures(network_of(_address(scope)), guarded)
        with self._in_flight.counted(self._most_at_a_time(scope)) as room:
            await (self.app if room else _crowded(scope))(scope, receive, guarded)
        return None

    def _most_at_a_time(self, scope: Scope) -> dict[str, int]:
        """How many such requests may be under way, by what they share."""
        most, caller = self.settings, scope["state"]["caller"]
        address, token = f"address {network_of(_address(scope))}", f"token {caller.name if caller else None}"
        if _STREAM.fullmatch(scope["path"]):
            limits = {f"streams of {address}": 2 * most.streams, "streams": 8 * most.streams}
            return limits | {f"streams of {token}": most.streams}
        limits = {address: 2 * most.requests}
        return limits | {token: most.requests} if caller else limits

    def _counting_failures(self, network: str, send: Send) -> Send:
        """Count only those sign-ins that fail; each was counted when it came, for many come at once."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 401:
                self._sign_ins.give_back(network)
            await send(message)

        return sending

    def _refusal(self, scope: Scope) -> Response | None:
        """A response that says no; None where the request may go on."""
        headers, path, network = Headers(scope=scope), scope["path"], network_of(_address(scope))
        if self.is_open():
            if not self._known_host(headers.get("host", "")):
                return answer(403, "this name is not the service's; call it by 127.0.0.1, or give serve --host-name")
            caller: Caller | None = LOCAL
        else:
            caller = self._caller(headers)
        scope.setdefault("state", {})["caller"] = caller
        if "transfer-encoding" in headers:
            return answer(411, "send the length of the body (Content-Length), not chunks")
        if scope["query_string"].count(b"&") > _MOST_PARAMETERS:
            return answer(422, f"a request has at most {_MOST_PARAMETERS} query parameters")
        if path in _PROBES and (caller or path in _OPEN):
            return None
        wait = self._requests.wait(f"token {caller.name}" if caller else network)
        if caller is None and headers.get("authorization"):
            wait = max(wait, self._mistakes.wait(network))
        if not wait and scope["method"] not in _SAFE and _from_another_site(headers):
            return answer(403, "another site asked for this; only this service's own pages may")
        if not wait and path == "/login" and scope["method"] == "POST":
            wait = self._sign_ins.wait(network)
        if wait:
            return _slow_down(scope, wait)
        if caller is None and not (path in _OPEN or path.startswith("/static/")):
            return _sign_in_first(headers, path)
        return None

    def is_open(self) -> bool:
        """Whether no token is needed: on loopback, as long as there is none."""
        return is_loopback(self.settings.host) and not self.tokens.everyone()

    def _caller(self, headers: Headers) -> Caller | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme:
            return self.tokens.caller(token.strip()) if scheme.lower() == "bearer" else None
        session = session_of(headers)
        return self.tokens.session_caller(session) if session else None

    def _known_host(self, host: str) -> bool:
        name = _parts(f"//{host}").hostname if _is_plain(host) else None
        return name in (*LOOPBACK, self.settings.host, *self.settings.host_names)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "?"


def session_of(headers: Headers) -> str | None:
    """The session that a browser's cookie names."""
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value if _SESSION.fullmatch(value) else None
    return None


def _keep_own_cookie(scope: Scope) -> None:
    """Drop all cookies but the session's, for the parser behind may take quadratic time to unquote the others."""
    headers = Headers(scope=scope)
    if "cookie" in headers:
        session = session_of(headers)
        own = [(b"cookie", f"{COOKIE}={session}".encode())] if session else []
        scope["headers"] = [(name, value) for name, value in headers.raw if name != b"cookie"] + own


def _parts(address: str) -> SplitResult:
    """The parts of an address; of what is none, nothing."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _is_plain(host: str) -> bool:
    return bool(host) and not set(host) & set("/@?#\\ ")


def _from_another_site(headers: Headers) -> bool:
    """By Sec-Fetch-Site, which every current browser sends; by Origin where it is missing."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and _parts(origin).netloc != headers.get("host")


def _sign_in_first(headers: Headers, path: str) -> Response:
    """Say that a token is needed: to a program, to a page that asks for its parts, or to a person."""
    if "hx-request" in headers:  # the page stops asking, and a person sees why
        here = _parts(headers.get("hx-current-url", "")).path or "/"
        return Response(status_code=401, headers={"HX-Redirect": f"/login?next={quote(here)}"})
    if path.startswith("/v1") or "text/html" not in headers.get("accept", ""):
        return answer(401, "send Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"})
    return RedirectResponse(f"/login?next={quote(path)}", 303)


def _slow_down(scope: Scope, wait: float) -> Response:
    said = f"too many requests; wait {wait:.1f} s"
    return respond(Request(scope), 429, detail=said, headers={"Retry-After": str(int(wait) + 1)})


def _crowded(scope: Scope) -> Response:
    said = "too many requests or event streams of yours are under way; end some, or wait for their answers"
    return respond(Request(scope), 429, detail=said, headers={"Retry-After": "5"})


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
