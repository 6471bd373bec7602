"""The documentation at ``/docs``: the site that ``make docs`` built, or a page that explains how to build it."""

from __future__ import annotations

import os

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from llmprune.service.api.access.auth import HEADERS
from llmprune.service.api.dependencies import TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.web.responses import page

router = APIRouter(include_in_schema=False)

_START = "index.html"
_POLICY = "Content-Security-Policy"
_HEADERS = {
    # the theme's style sheet holds its icons as data: addresses
    _POLICY: HEADERS[_POLICY].replace("img-src 'self'", "img-src 'self' data:"),
    "Cache-Control": "no-cache",  # kept by the browser, and asked for again by its ETag
}


@router.get("/docs")
@router.get("/docs/")
def start_page(request: Request, service: TheService) -> Response:
    """Redirect to the first page of the site, or explain how to build the site."""
    if (service.settings.documentation / _START).is_file():
        return RedirectResponse(f"/docs/{_START}", 303)
    return page(request, "documentation", status=404, at="docs")


@router.get("/docs/{path:path}")
async def site_file(request: Request, path: str, *, service: TheService) -> Response:
    """A file of the site. Raises Refused (404) if there is none of this name in its folder."""
    files = StaticFiles(directory=service.settings.documentation, check_dir=False)
    try:
        response = await files.get_response(os.path.normpath(path), request.scope)
    except HTTPException as error:
        raise Refused(404, f"the documentation has no page {path!r}; begin at /docs") from error
    response.headers.update(_HEADERS)
    return response
