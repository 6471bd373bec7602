"""Installation of the pages in the app."""

from __future__ import annotations

from fastapi import FastAPI

from llmprune.service.web import (
    account,
    audit,
    drafts,
    editor,
    job_actions,
    job_log,
    model_picker,
    notifications,
    pages,
    recipe_schema,
    sharing,
    sign_in,
    users,
)
from llmprune.service.web.responses import error_page


def install(app: FastAPI) -> None:
    """Add all pages to the app, and have failures shown as pages to people."""
    own = (pages, job_actions, job_log, notifications, editor, drafts, recipe_schema)
    for module in (*own, sign_in, account, users, audit, sharing):
        app.include_router(module.router)
    model_picker.install(app)
    app.state.error_page = error_page
