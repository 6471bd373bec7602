"""Installation of the pages in the app."""

from __future__ import annotations

from fastapi import FastAPI

from llmprune.service.web import (
    account,
    audit,
    delete_user,
    drafts,
    editor,
    follow_ups,
    job_actions,
    job_log,
    model_picker,
    models,
    notifications,
    pages,
    recipe_schema,
    sharing,
    sign_in,
    sweeps,
    times,
    uploads,
    users,
)
from llmprune.service.web.responses import error_page


def install(app: FastAPI) -> None:
    """Add all pages to the app, and have failures shown as pages to people."""
    jobs = (pages, job_actions, follow_ups, job_log, notifications, editor, drafts, times, recipe_schema)
    for module in (*jobs, models, uploads, sweeps, sign_in, account, users, delete_user, audit, sharing):
        app.include_router(module.router)
    model_picker.install(app)
    app.state.error_page = error_page
