"""Routes of notifications: who is told when a job ends, and what was sent."""

from __future__ import annotations

from fastapi import APIRouter

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.notifications.key_file import secret_of
from llmprune.service.notifications.targets import checked_targets
from llmprune.service.notifications.values import JobNotifications, Targets, UserNotifications
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1", tags=["notifications"])

_BODY_LIMIT = 16 * 1024  # bytes; FastAPI reads this body on the event loop


@router.get("/jobs/{job}/notifications", responses=documented(404, 422))
def job_notifications(job: JobId, service: TheService, *, caller: TheCaller) -> JobNotifications:
    """Show who is told when a job ends, and what was sent. Only its owner and admins may see that."""
    return notifications_of(service, service.own_job(job, caller).id)


@router.put("/jobs/{job}/notifications", responses=documented(404, 409, 413, 422, 507), max_body_size=_BODY_LIMIT)
def set_job_notifications(job: JobId, targets: Targets, *, service: TheService, caller: TheCaller) -> JobNotifications:
    """Replace the places that are told when a job ends."""
    change_targets(service, service.own_job(job, caller).id, targets=targets)
    return notifications_of(service, job)


@router.get("/notifications", responses=documented())
def my_notifications(service: TheService, caller: TheCaller) -> UserNotifications:
    """Show the targets of the caller's new jobs that name none, and the secret that signs their webhooks."""
    return notifications_for(service, caller)


@router.put("/notifications", responses=documented(413, 422, 507), max_body_size=_BODY_LIMIT)
def set_my_notifications(targets: Targets, service: TheService, *, caller: TheCaller) -> UserNotifications:
    """Replace the targets of the caller's new jobs that name none."""
    change_defaults(service, caller, targets=targets)
    return notifications_for(service, caller)


@router.post("/notifications/test", status_code=202, responses=documented(409, 422, 507))
def test_my_notifications(service: TheService, caller: TheCaller) -> UserNotifications:
    """Send a test to the caller's targets."""
    send_test(service, caller)
    return notifications_for(service, caller)


def notifications_of(service: Service, job: str) -> JobNotifications:
    """Return the notifications of a job."""
    saved = service.outbox.targets(job)
    return JobNotifications(
        targets=Targets.of(saved.targets),
        unreadable=saved.unreadable,
        deliveries=service.outbox.deliveries(job),
    )


def notifications_for(service: Service, caller: Caller) -> UserNotifications:
    """Return the notifications of a user's new jobs."""
    saved = service.outbox.defaults(caller.name)
    return UserNotifications(
        targets=Targets.of(saved.targets),
        unreadable=saved.unreadable,
        secret=secret_of(service.settings.data_dir, caller.name, account=service.users.account(caller.name)),
        tests=service.outbox.tests(caller.name),
    )


def change_targets(service: Service, job: str, *, targets: Targets) -> None:
    """Replace the targets of a job. Raises RecipeError."""
    found = checked_targets(targets.urls, targets.emails, settings=service.settings.notifications)
    service.outbox.set_targets(job, found)


def change_defaults(service: Service, caller: Caller, *, targets: Targets) -> None:
    """Replace the targets of a user's new jobs. Raises RecipeError."""
    found = checked_targets(targets.urls, targets.emails, settings=service.settings.notifications)
    service.outbox.set_defaults(caller.name, found)


def send_test(service: Service, caller: Caller) -> None:
    """Queue a test to a user's targets. Raises Refused (409) where there are none, or the last test still waits."""
    if any(test.state == "pending" for test in service.outbox.tests(caller.name)):
        raise Refused(409, "a test is on its way; wait until it was delivered or given up")
    if not service.outbox.send_test(caller.name):
        raise Refused(409, "there is no target to send a test to; save one first")
