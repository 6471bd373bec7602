"""Installation of the pages in the app."""

from __future__ import annotations

from fastapi import FastAPI

from llmprune.service.web import account, audit, editor, follow_ups, job_actions, pages, sharing, sign_in, users
from llmprune.service.web.responses import error_page


def install(app: FastAPI) -> None:
    """Add all pages to the app, and have failures shown as pages to people."""
    for module in (pages, job_actions, follow_ups, editor, sign_in, account, users, audit, sharing):
        app.include_router(module.router)
    app.state.error_page = error_page
