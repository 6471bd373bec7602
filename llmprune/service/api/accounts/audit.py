"""Route of the audit log, for admins."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from llmprune.service.api.accounts.values import AuditEntries, AuditEntry
from llmprune.service.api.dependencies import TheCaller, TheService
from llmprune.service.api.error_responses import documented
from llmprune.service.audit_log import AuditPage, AuditQuery, read_audit

router = APIRouter(prefix="/v1", tags=["audit"])

TIME = r"^\d{4}-\d{2}-\d{2}(T\d{2}(:\d{2}(:\d{2}Z?)?)?)?$"
UserFilter = Annotated[
    str | None, Query(max_length=64, description="Only what this user did, or what was done to this user.")
]
ActionFilter = Annotated[str | None, Query(max_length=100, description="Part of the action, such as cancel.")]
JobFilter = Annotated[str | None, Query(max_length=12, description="Only changes of this job.")]
Since = Annotated[str | None, Query(pattern=TIME, description="From this day or moment (UTC), such as 2026-01-31.")]
Until = Annotated[str | None, Query(pattern=TIME, description="Up to the end of this day or moment (UTC).")]
Before = Annotated[str | None, Query(max_length=50, pattern=r"^\d+-\d+$", description="Field next of the last page.")]


@router.get("/audit", responses=documented(409, 422))
def show_audit(
    service: TheService,
    caller: TheCaller,
    *,
    user: UserFilter = None,
    action: ActionFilter = None,
    job: JobFilter = None,
    since: Since = None,
    until: Until = None,
    before: Before = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Maximum number of entries on the page.")] = 50,
) -> AuditEntries:
    """Return who tried to change what, the newest first."""
    del caller
    query = AuditQuery(user=user, action=action, job=job, since=since, until=until, before=before, limit=limit)
    found = read_audit(service.settings.data_dir, query)
    return AuditEntries(entries=entries_of(found), next=found.next, read_all=found.read_all)


def entries_of(page: AuditPage) -> list[AuditEntry]:
    """Convert lines of the log, whatever a program has written there."""
    return [_entry(line) for line in page.entries]


def _entry(line: dict[str, Any]) -> AuditEntry:
    texts = {
        name: str(line[name])[:300] for name in ("time", "caller", "address", "action", "job", "user") if line.get(name)
    }
    details = line.get("details")
    if "user" not in texts and isinstance(line.get("token"), str):  # of a command
        texts["user"] = line["token"]
    status = line.get("status")
    return AuditEntry(
        **texts,
        status=status if isinstance(status, int) else None,
        details=details if isinstance(details, dict) else None,
    )
