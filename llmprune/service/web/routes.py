"""Installation of the pages in the app."""

from __future__ import annotations

from fastapi import FastAPI

from llmprune.service.web import (
    account,
    audit,
    editor,
    follow_ups,
    job_actions,
    models,
    pages,
    sharing,
    sign_in,
    sweeps,
    users,
)
from llmprune.service.web.responses import error_page


def install(app: FastAPI) -> None:
    """Add all pages to the app, and have failures shown as pages to people."""
    for module in (
        pages, models, sweeps, job_actions, follow_ups, editor, sign_in, account, users, audit, sharing,
    ):  # fmt: skip
        app.include_router(module.router)
    app.state.error_page = error_page
