"""Sign-in and sign-out: a token opens a browser session, which a cookie names."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from llmprune.service.api.auth import COOKIE, session_of
from llmprune.service.api.dependencies import TheService
from llmprune.service.jobs.tokens import SESSION_SECONDS
from llmprune.service.web.responses import page, page_router

router = page_router()


@router.get("/login")
def login_page(request: Request, next: Annotated[str, Query(max_length=500)] = "/") -> Response:
    """Show the sign-in page."""
    return page(request, "login", next=next, wrong=False)


@router.post("/login")
def login(
    request: Request,
    service: TheService,
    *,
    token: Annotated[str, Form(max_length=500)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    """Open a session. The token is stored neither here nor in the browser."""
    session = service.tokens.open_session(token.strip())
    if session is None:
        return page(request, "login", status=401, next=next, wrong=True)
    request.state.caller = service.tokens.session_caller(session)  # for the audit log
    is_encrypted = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
    is_local = next.startswith("/") and not next.startswith(("//", "/\\"))
    response = RedirectResponse(next if is_local else "/", 303)
    response.set_cookie(
        COOKIE,
        session,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=is_encrypted,
    )
    return response


@router.post("/logout")
def logout(request: Request, service: TheService) -> Response:
    """End the session and show the sign-in page."""
    session = session_of(request.headers)
    if session:
        service.tokens.close_session(session)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE)
    return response
