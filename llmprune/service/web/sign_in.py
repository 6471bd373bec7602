"""Sign-in and sign-out: a token or the OpenID provider opens a browser session, which a cookie names."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated

from fastapi import Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from llmprune.service.api.access.auth import CALLBACK, COOKIE, FLOW_COOKIE, cookie_of, session_of
from llmprune.service.api.dependencies import TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.oidc.accounts import user_of
from llmprune.service.oidc.provider import Flow, Provider, SignInRefused
from llmprune.service.users.sessions import SESSION_SECONDS
from llmprune.service.users.tokens import AccessEnded
from llmprune.service.web.responses import page, page_router

router = page_router()

_LOCAL = re.compile(r"/(?![/\\])[!-\[\]-~]*")
_FLOW_SECONDS = 600  # to sign in at the provider
Next = Annotated[str, Query(max_length=400)]


@router.get("/login")
def login_page(request: Request, next: Next = "/", *, out: bool = False) -> Response:
    """Show the sign-in page. ``out``: the person has just signed out."""
    provider = _provider(request)
    end = provider.sign_out_address(f"{request.base_url}login") if out and provider else None
    return _login(request, next=next, out=out, end=end)


@router.post("/login")
def login(
    request: Request,
    service: TheService,
    *,
    token: Annotated[str, Form(max_length=500)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    """Open a session. The token is stored neither here nor in the browser."""
    try:
        session = service.sessions.open_with(token.strip(), request.headers.get("user-agent", ""))
    except AccessEnded as error:
        return _login(request, status=error.status, next=next, problem=str(error))
    if session is None:
        return _login(request, status=401, next=next, problem="There is no such token.")
    request.state.caller = service.sessions.caller(session)  # for the audit log
    response = RedirectResponse(_local(next), 303)
    _set_cookie(request, response, session=session)
    return response


@router.post("/logout")
def logout(request: Request, service: TheService) -> Response:
    """End the session and show the sign-in page."""
    session = session_of(request.headers)
    if session:
        service.sessions.close(session)
    response = RedirectResponse("/login?out=true" if _provider(request) else "/login", 303)
    response.delete_cookie(COOKIE)
    return response


@router.get("/login/oidc")
def ask_provider(request: Request, next: Next = "/") -> Response:
    """Send the person to the OpenID provider. The browser keeps state, nonce and PKCE verifier until the answer."""
    try:
        address, flow = _required(request).begin(_callback(request))
    except SignInRefused as error:
        return _login(request, status=error.status, next=next, problem=str(error))
    kept = (flow.state, flow.nonce, flow.verifier, base64.urlsafe_b64encode(next.encode()).decode().rstrip("="))
    response = RedirectResponse(address, 303)
    # lax: the answer comes from the provider's site
    response.set_cookie(
        FLOW_COOKIE,
        "~".join(kept),
        max_age=_FLOW_SECONDS,
        path="/login",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@router.get(CALLBACK)
def provider_answered(request: Request, service: TheService) -> Response:
    """Check the provider's answer, make the user at the first sign-in, and open a session."""
    provider = _required(request)
    flow, next = _flow(request)
    answer = {name: value[:4000] for name, value in request.query_params.items()}
    try:
        claims = provider.finish(flow, answer, redirect_uri=_callback(request))
        user = user_of(claims, provider.settings, database=service.database)
    except SignInRefused as error:
        response = _login(request, status=error.status, next=next, problem=str(error))
        response.delete_cookie(FLOW_COOKIE, path="/login")
        return response
    session = service.sessions.open(user, None, browser=request.headers.get("user-agent", ""))
    request.state.caller = service.sessions.caller(session)
    # a page and no redirect: browsers send a strict cookie only where this site began the navigation
    response = page(request, "signed_in", next=_local(next))
    _set_cookie(request, response, session=session)
    response.delete_cookie(FLOW_COOKIE, path="/login")
    return response


def _login(request: Request, *, status: int = 200, **values: object) -> Response:
    provider = _provider(request)
    known = {"next": "/", "problem": None, "out": False, "end": None, "provider": provider and provider.settings.host}
    return page(request, "login", status=status, **known | values)


def _set_cookie(request: Request, response: Response, *, session: str) -> None:
    is_encrypted = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
    response.set_cookie(
        COOKIE,
        session,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=is_encrypted,
    )


def _local(next: str) -> str:
    """Return an address of this service; the first page for any other, and for signs that browsers leave out."""
    return next if _LOCAL.fullmatch(next) else "/"


def _callback(request: Request) -> str:
    return f"{str(request.base_url).rstrip('/')}{CALLBACK}"


def _flow(request: Request) -> tuple[Flow, str]:
    """Return the sign-in under way in this browser, and the page to show then; an empty flow where there is none."""
    parts = (cookie_of(request.headers, FLOW_COOKIE) or "").split("~")
    if len(parts) != 4:
        return Flow("", "", ""), "/"
    try:
        next = base64.urlsafe_b64decode(parts[3] + "=" * (-len(parts[3]) % 4)).decode()
    except (binascii.Error, ValueError):
        next = "/"
    return Flow(*parts[:3]), next


def _provider(request: Request) -> Provider | None:
    found: Provider | None = request.app.state.provider
    return found


def _required(request: Request) -> Provider:
    found = _provider(request)
    if found is None:
        raise Refused(404, "this service has no OpenID provider; sign in with a token")
    return found
