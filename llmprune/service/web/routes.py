"""Installation of the pages in the app."""

from __future__ import annotations

from fastapi import FastAPI

from llmprune.service.web import editor, job_actions, models, pages, sign_in, sweeps
from llmprune.service.web.responses import error_page


def install(app: FastAPI) -> None:
    """Add all pages to the app, and have failures shown as pages to people."""
    for module in (pages, models, sweeps, job_actions, editor, sign_in):
        app.include_router(module.router)
    app.state.error_page = error_page
