"""Page of the audit log, for admins."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Query, Request
from fastapi.responses import Response

from llmprune.service.api.accounts.audit import entries_of
from llmprune.service.api.accounts.values import AuditEntry
from llmprune.service.api.dependencies import TheCaller, TheService
from llmprune.service.audit_log import AuditQuery, read_audit
from llmprune.service.web.responses import page, page_router

router = page_router()

PAGE_SIZE = 50  # entries
# Last word of a route, and the words for people; the whole route where that is not enough.
_WORDS = {
    "POST /v1/jobs": "submitted a job",
    "POST /submit": "submitted a job",
    "POST /login": "signed in with a token",
    "GET /login/oidc/callback": "signed in at the provider",
    "POST /logout": "signed out",
    "POST /v1/users": "made a user",
    "POST /users": "made a user",
    "POST /users/{user}": "changed a user",
    "PATCH /v1/users/{user}": "changed a user",
    "DELETE /v1/users/{user}": "deleted a user",
    "POST /users/{user}/delete": "deleted a user",
    "POST /v1/models/label": "changed labels of models",
    "POST /models/label": "changed labels of models",
    "POST /v1/models/delete": "deleted models",
    "POST /models/delete": "deleted models",
    "DELETE /v1/jobs/{job}": "deleted a job",
    "POST /account/sessions/end": "ended own sessions",
    "DELETE /v1/account/sessions": "ended own sessions",
    "DELETE /v1/users/{user}/sessions": "ended a user's sessions",
    "POST /users/{user}/sign-out": "ended a user's sessions",
    "POST /account/tokens": "made a token",
    "POST /v1/account/tokens": "made a token",
    "POST /users/{user}/tokens": "made a token for a user",
    "POST /v1/users/{user}/tokens": "made a token for a user",
    "DELETE /v1/account/tokens/{token}": "revoked a token",
    "DELETE /v1/users/{user}/tokens/{token}": "revoked a user's token",
    "POST /users/{user}/tokens/{token}/revoke": "revoked a user's token",
    "POST /account/tokens/{token}/revoke": "revoked a token",
    "PUT /v1/users/{user}/quotas": "changed a user's quotas",
}
_LAST_WORDS = {
    "cancel": "cancelled a job",
    "retry": "retried a job",
    "reevaluate": "evaluated more samples",
    "push": "pushed a model",
    "delete": "deleted a job",
    "share": "shared a job",
    "unshare": "made a job private",
    "quotas": "changed a user's quotas",
    "transfer": "transferred a user's jobs",
}
# Choices of the filter, and the part of an action that each searches for.
CHOICES = {
    "Jobs": "/jobs",
    "Submissions": "POST /v1/jobs",
    "Sign-ins": "login",
    "Tokens": "token",
    "Users": "user",
    "Sharing": "share",
    "Pushes": "push",
}
Text = Annotated[str, Query(max_length=100)]


@router.get("/audit")
def audit_page(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    user: Text = "",
    action: Text = "",
    job: Text = "",
    since: Annotated[str, Query(pattern=r"^(\d{4}-\d{2}-\d{2})?$")] = "",
    until: Annotated[str, Query(pattern=r"^(\d{4}-\d{2}-\d{2})?$")] = "",
    before: Annotated[str, Query(max_length=50)] = "",
) -> Response:
    """Show who tried to change what, the newest first."""
    del caller
    filters = {"user": user.strip(), "action": action.strip(), "job": job.strip(), "since": since, "until": until}
    given = {name: value for name, value in filters.items() if value}
    query: dict[str, Any] = given | ({"before": before} if before else {})
    found = read_audit(service.settings.data_dir, AuditQuery(**query, limit=PAGE_SIZE))
    older = f"/audit?{urlencode(given | {'before': found.next})}" if found.next else None
    rows = [(entry, words_of(entry.action), result_of(entry)) for entry in entries_of(found)]
    values: dict[str, Any] = {
        "rows": rows,
        "older": older,
        "filters": filters,
        "filtered": bool(given),
        "choices": CHOICES,
    }
    return page(request, "audit", **values, read_all=found.read_all, first=not before, at="audit")


def words_of(action: str) -> str:
    """Return words for an action; the action itself where there are none."""
    return _WORDS.get(action) or _LAST_WORDS.get(action.rsplit("/", 1)[-1], action)


def result_of(entry: AuditEntry) -> tuple[str, str]:
    """Return the result of an attempt in words, and its class: good or bad."""
    status = entry.status
    if status is None or status < 400:
        return "done", "good"
    words = {
        401: "not signed in",
        403: "not allowed",
        404: "not found",
        409: "conflict",
        422: "refused",
        429: "too many",
    }
    return words.get(status, "failed" if status >= 500 else "refused"), "bad"
