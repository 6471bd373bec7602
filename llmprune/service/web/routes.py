"""Installation of the pages in the app."""

from __future__ import annotations

from fastapi import FastAPI

from llmprune.service.web import (
    account,
    audit,
    delete_user,
    models,
    notifications,
    pages,
    sign_in,
    sweeps,
    uploads,
    users,
)
from llmprune.service.web.job import actions, follow_ups, log, sharing
from llmprune.service.web.new_job import drafts, editor, model_picker, recipe_schema, times
from llmprune.service.web.responses import error_page


def install(app: FastAPI) -> None:
    """Add all pages to the app, and have failures shown as pages to people."""
    jobs = (pages, actions, follow_ups, log, notifications, editor, drafts, times, recipe_schema)
    for module in (*jobs, models, uploads, sweeps, sign_in, account, users, delete_user, audit, sharing):
        app.include_router(module.router)
    model_picker.install(app)
    app.state.error_page = error_page
