"""Responses of the pages: a rendered template for the current user, and failures as pages."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from llmprune.service.api.error_responses import Failure, Refused
from llmprune.service.users.tokens import LOCAL
from llmprune.service.web.form_body import FormRoute
from llmprune.service.web.render import render


def page_router() -> APIRouter:
    """Make a router for pages, which are no part of the OpenAPI document."""
    return APIRouter(include_in_schema=False, default_response_class=HTMLResponse, route_class=FormRoute)


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """Render a page, or a part of one, for the caller."""
    caller = getattr(request.state, "caller", None)
    known = {"caller": caller, "session": caller not in (None, LOCAL), "at": "", "oob": False}
    return HTMLResponse(render(template, **known | values), status)


def error_page(request: Request, failure: Failure) -> Response:
    """Render a failure as a page."""
    values = {"title": failure.title, "detail": failure.detail, "problems": failure.problems}
    return page(request, "error", status=failure.status, **values)


def plain_token(token: str) -> str | None:
    """Return the hub token of a form, None where the field is empty. Raises Refused (422)."""
    stripped = token.strip()
    if not (stripped.isascii() and stripped.isprintable()) or " " in stripped:
        raise Refused(422, "the hub token has letters that no hub token has; copy it again")
    return stripped if token else None
