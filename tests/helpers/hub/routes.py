"""Application that answers the requests of the hub's client libraries from the state of a hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from helpers.hub.access import Refused
from helpers.hub.downloads import DownloadRoutes
from helpers.hub.repositories import RepositoryRoutes
from helpers.hub.uploads import UploadRoutes

if TYPE_CHECKING:
    from helpers.hub.server import Hub


def make_app(hub: Hub) -> FastAPI:
    """Return an application with all routes of a hub."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.exception_handler(Refused)(_refuse)
    for routes in (RepositoryRoutes(hub), UploadRoutes(hub), DownloadRoutes(hub)):
        routes.add_to(app)
    return app


async def _refuse(request: Request, refused: Refused) -> Response:
    headers = {"X-Error-Code": refused.code} if refused.code else {}
    if refused.message:
        headers["X-Error-Message"] = refused.message
    body = None if request.method == "HEAD" else {"error": refused.message or refused.code}
    return JSONResponse(body, refused.status, headers)
