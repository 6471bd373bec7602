"""Pages of notifications: the targets of a user's new jobs, and those of one job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Form, Request
from fastapi.responses import RedirectResponse, Response

from llmprune.common.errors import RecipeError
from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.jobs.notifications import notifications_for, send_test
from llmprune.service.notifications.outbox import SavedTargets
from llmprune.service.notifications.targets import Target, checked_targets, split_lines, unmasked
from llmprune.service.users.tokens import Caller
from llmprune.service.web.responses import page, page_router

router = page_router()

_Urls = Annotated[str, Form(max_length=12_000)]
_Emails = Annotated[str, Form(max_length=2_000)]


@router.get("/notifications")
def notifications_page(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Show the targets of the caller's new jobs."""
    return _page(request, service, caller=caller)


@router.post("/notifications")
def save_targets(
    request: Request, service: TheService, *, caller: TheCaller, urls: _Urls = "", emails: _Emails = ""
) -> Response:
    """Save the targets of the caller's new jobs, or show what is wrong with them."""
    given = split_lines(urls), split_lines(emails)
    try:
        targets = _targets(given, service.outbox.defaults(caller.name), service=service)
    except RecipeError as error:
        return _page(request, service, caller=caller, given=given, problems=error.problems)
    service.outbox.set_defaults(caller.name, targets)
    return RedirectResponse("/notifications", 303)


@router.post("/notifications/test")
def test_targets(service: TheService, *, caller: TheCaller) -> Response:
    """Send a test to the caller's targets."""
    send_test(service, caller)
    return RedirectResponse("/notifications", 303)


@router.post("/jobs/{job}/notifications")
def save_job_targets(
    job: JobId, service: TheService, *, caller: TheCaller, urls: _Urls = "", emails: _Emails = ""
) -> Response:
    """Save the targets of a job and return to its page."""
    found = service.own_job(job, caller)
    given = split_lines(urls), split_lines(emails)
    targets = _targets(given, service.outbox.targets(job), service=service)
    service.outbox.set_targets(found.id, targets)
    return RedirectResponse(f"/jobs/{job}#notify", 303)


def _targets(given: tuple[list[str], list[str]], saved: SavedTargets, *, service: Service) -> tuple[Target, ...]:
    """Return the targets of a form, in which saved ones may be masked. Raises RecipeError."""
    urls = unmasked("webhook", given[0], saved=saved.targets)
    emails = unmasked("email", given[1], saved=saved.targets)
    return checked_targets(urls, emails, settings=service.settings.notifications)


def _page(
    request: Request,
    service: Service,
    *,
    caller: Caller,
    given: tuple[Sequence[str], Sequence[str]] | None = None,
    problems: Sequence[str] = (),
) -> Response:
    settings, mine = service.settings.notifications, notifications_for(service, caller)
    saved = service.outbox.defaults(caller.name)
    values: dict[str, Any] = {
        "mine": mine,
        "urls": given[0] if given else saved.masked("webhook"),
        "emails": given[1] if given else saved.masked("email"),
        "problems": problems,
        "webhooks": settings.webhooks != "off",
        "listed": settings.webhook_hosts if settings.webhooks == "listed" else None,
        "mail": settings.smtp is not None,
        "domains": settings.mail_domains,
    }
    return page(request, "notifications", status=422 if problems else 200, at="notifications", **values)
