"""Steps of tests about notifications."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from helpers.service import ServiceHarness
from llmprune.service.jobs.job import Outcome
from llmprune.service.notifications.deliverer import Deliverer


def deliver(harness: ServiceHarness) -> int:
    """Send what is due, as a supervisor that has just started; return how many were tried."""
    with ThreadPoolExecutor(2) as senders:
        return Deliverer(harness.settings).round(senders)


def make_due(harness: ServiceHarness, **columns: Any) -> None:
    """Set columns of the pending notifications, which are then due."""
    columns = {"due": 0.0} | columns
    names = ", ".join(f"{name} = ?" for name in columns)
    with harness.service.database.write() as connection:
        connection.execute(f"UPDATE outbox SET {names} WHERE state = 'pending'", [*columns.values()])


def end(harness: ServiceHarness, job: str, state: Any = "failed", error: str | None = None) -> None:
    """Start and end a job without running it."""
    harness.service.jobs.start(job, [])
    harness.service.jobs.end(job, Outcome(state, 1, error), ran_seconds=12.0)


def states(harness: ServiceHarness, job: str) -> list[tuple[str, int]]:
    """Return state and tries of the deliveries of a job."""
    return [(one.state, one.tries) for one in harness.service.outbox.deliveries(job)]
