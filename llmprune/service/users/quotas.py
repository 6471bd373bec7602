"""Quotas: how many jobs, GPUs and bytes each user may have. The operator's values hold unless a user has others."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmprune.common.errors import RecipeError
from llmprune.common.schema import format_size
from llmprune.results.formatting import plural
from llmprune.service.database.database import Database, Row, Transaction
from llmprune.service.jobs.fair_order import last_starts
from llmprune.service.jobs.job import ACTIVE, Job
from llmprune.service.jobs.store_reads import Conflict, QueueFull, first_row
from llmprune.service.settings import Settings
from llmprune.service.users.users import SOURCE

_DAY = 86_400
_COUNTS = {
    "queued": "SELECT count(*) n FROM jobs WHERE owner = ? AND state = 'queued'",
    "kept": "SELECT count(*) n FROM jobs WHERE owner = ?",
    "per_day": "SELECT number n FROM submitted_jobs WHERE owner = ? AND day = ?",
}
_ACTIVE = ", ".join(f"'{state}'" for state in ACTIVE)


class Quotas(BaseModel):
    """Limits of one user; null: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queued: int | None = Field(None, description="Waiting jobs.")
    running: int | None = Field(None, description="Running jobs at a time.")
    gpus: int | None = Field(None, description="GPUs at a time.")
    disk: int | None = Field(None, description="Bytes on disk of all jobs.")
    per_day: int | None = Field(None, description="Submissions in a day (UTC).")
    kept: int | None = Field(None, description="Jobs in all, ended ones included.")


QuotaName = Literal["queued", "running", "gpus", "disk", "per_day", "kept"]
# Limits of one user in place of the service's; None: no limit. A quota that is not listed is the service's.
OwnQuotas = dict[QuotaName, Annotated[int, Field(ge=0, le=2**53)] | None]


class Usage(BaseModel):
    """A user's share of each quota."""

    queued: int = Field(description="Waiting jobs.")
    running: int = Field(description="Running jobs.")
    gpus: int = Field(description="GPUs of the running jobs.")
    disk: int = Field(description="Bytes on disk of all jobs, as last measured.")
    per_day: int = Field(description="Submissions today (UTC).")
    kept: int = Field(description="Jobs in all, ended ones included.")


LABELS: dict[QuotaName, str] = {
    "running": "Jobs running at a time",
    "queued": "Jobs waiting",
    "gpus": "GPUs at a time",
    "disk": "Disk space of jobs",
    "per_day": "Jobs submitted a day (UTC)",
    "kept": "Jobs kept",
}


def default_quotas(settings: Settings) -> Quotas:
    """Return the quotas of a user without quotas of their own."""
    return Quotas(
        queued=settings.max_queued,
        running=settings.max_running,
        gpus=settings.max_gpus,
        disk=settings.user_disk,
        per_day=settings.jobs_per_day,
        kept=settings.max_jobs,
    )


def own_quotas(database: Database, owner: str) -> OwnQuotas:
    """Return the quotas that an admin gave a user."""
    return {row["quota"]: row["value"] for row in database.read(*_own_query(owner))}


def set_own_quotas(database: Database, owner: str, *, quotas: OwnQuotas) -> None:
    """Give a user these quotas in place of all earlier ones. Raises RecipeError where there is no such user."""
    with database.write() as connection:
        if first_row(connection, "SELECT 1 FROM users WHERE name = ?", owner) is None:
            raise RecipeError(f"there is no user {owner!r}", SOURCE)
        connection.execute("DELETE FROM own_quotas WHERE owner = ?", (owner,))
        for name, value in quotas.items():
            connection.execute("INSERT INTO own_quotas (owner, quota, value) VALUES (?, ?, ?)", (owner, name, value))


def audited(quotas: OwnQuotas) -> dict[str, Any]:
    """Return what the audit log says of the quotas that an admin gives a user."""
    return {name: "none" if value is None else value for name, value in quotas.items()}


def quotas_of(database: Database, owner: str, *, defaults: Quotas) -> Quotas:
    """Return the quotas that hold for a user."""
    return _with_own(defaults, database.read(*_own_query(owner)))


def usage_of(database: Database, owner: str) -> Usage:
    """Return how much of each quota a user has used."""
    rows = database.read(
        "SELECT count(*) AS kept, "
        "coalesce(sum(CASE WHEN state = 'queued' THEN 1 ELSE 0 END), 0) AS queued, "
        f"coalesce(sum(CASE WHEN state IN ({_ACTIVE}) THEN 1 ELSE 0 END), 0) AS running, "
        f"coalesce(sum(CASE WHEN state IN ({_ACTIVE}) THEN gpus ELSE 0 END), 0) AS gpus FROM jobs WHERE owner = ?",
        (owner,),
    )
    return Usage(**dict(rows[0]), disk=_disk(database.read(*_disk_query(owner))), per_day=_today(database, owner))


@dataclass(frozen=True)
class Demand:
    """Share of its owner's quotas that a request takes; by default that of one new job."""

    jobs: int = 1  # submissions of the day
    waiting: int = 1  # jobs that enter the queue
    kept: int = 1  # jobs that are added to the owner's
    gpus: int = 0  # of the job that needs most
    size: int = 0  # bytes that the request brings

    @property
    def of_each(self) -> dict[QuotaName, int]:
        """Number by quota, of those that count jobs."""
        return {"queued": self.waiting, "kept": self.kept, "per_day": self.jobs}


def require_quota(connection: Transaction, owner: str, *, demand: Demand, defaults: Quotas) -> None:
    """Count the submissions of a request, or raise QueueFull where a quota of the owner leaves no room for it.

    Every request that starts work or brings files passes here: submissions, sweeps, follow-ups, pushes, retries,
    evaluations of more samples and uploads. ``defaults``: quotas of an owner without own ones.
    """
    check_quota(connection, owner, demand=demand, defaults=defaults)
    if demand.jobs:
        day = _day()
        connection.execute("DELETE FROM submitted_jobs WHERE owner = ? AND day < ?", (owner, day))
        connection.execute(
            "INSERT INTO submitted_jobs (owner, day, number) VALUES (?, ?, ?) "
            "ON CONFLICT (owner, day) DO UPDATE SET number = submitted_jobs.number + excluded.number",
            (owner, day, demand.jobs),
        )


def require_quota_again(connection: Transaction, job: Row, *, defaults: Quotas) -> None:
    """Count an ended job that is queued again as a submission, or raise QueueFull."""
    require_quota(connection, job["owner"], demand=Demand(kept=0, gpus=job["gpus"]), defaults=defaults)


def check_quota(connection: Transaction, owner: str, *, demand: Demand, defaults: Quotas) -> None:
    """Raise QueueFull where a quota of the owner leaves no room for a request: which, its use, and a remedy.

    Raises Conflict where the owner was deleted while the request was under way.
    """
    if first_row(connection, "SELECT 1 FROM deleted_users WHERE name = ?", owner) is not None:
        raise Conflict(f"the user {owner} was deleted")
    quotas = _with_own(defaults, connection.execute(*_own_query(owner)).fetchall())
    if quotas.gpus is not None and demand.gpus > quotas.gpus:
        raise _full("gpus", f"the job needs {demand.gpus:,}, and {owner} may use {quotas.gpus:,}", "give fewer")
    for name, more in demand.of_each.items():
        limit = getattr(quotas, name)
        if limit is None or not more:
            continue
        used = _count(connection, _COUNTS[name], owner, *([_day()] if name == "per_day" else []))
        if used + more > limit:
            asked = f", and {more:,} more were asked for" if more > 1 else ""
            raise _full(name, f"{owner} has {used:,} of {limit:,}{asked}", _remedy(name) if limit else "")
    if quotas.disk is not None:
        query, values = _disk_query(owner)
        used = _disk(connection.execute(query, values).fetchall())
        if used >= quotas.disk or used + demand.size > quotas.disk:
            asked = f", and this is {format_size(demand.size)} more" if demand.size else ""
            has = f"{owner} uses {format_size(used)} of {format_size(quotas.disk)}{asked}"
            raise _full("disk", has, "delete jobs or models")


def _full(name: QuotaName, state: str, remedy: str) -> QueueFull:  # noqa: PLR0917 - private
    helps = f"{remedy}, or ask an admin for more" if remedy else "ask an admin for more"
    return QueueFull(f"quota {LABELS[name]!r}: {state}; {helps}")


def _remedy(name: QuotaName) -> str:
    if name == "queued":
        return "wait until one starts, cancel one"
    if name == "kept":
        return "delete some that have ended"
    hours = max(1, round(((_day() + 1) * _DAY - time.time()) / 3600))
    return f"the next day begins in about {plural(hours, 'hour')} (UTC)"


class Room:
    """Room that each owner's quotas leave for jobs that start now. ``last``: each owner's last start."""

    def __init__(
        self,
        quotas: Mapping[str, Quotas],
        running: Sequence[Job],
        *,
        disk: Mapping[str, int],
        last: Mapping[str, int],
    ) -> None:
        self.last = last
        self._quotas, self._disk = quotas, disk
        self._jobs: dict[str, int] = {}
        self._gpus: dict[str, int] = {}
        for job in running:
            self.take(job)

    def held(self, job: Job) -> str | None:
        """Return why a job has to wait for its owner's other jobs; None where it may start."""
        quotas = self._quotas.get(job.owner, Quotas())
        jobs, gpus = self._jobs.get(job.owner, 0), self._gpus.get(job.owner, 0)
        if quotas.running is not None and jobs >= quotas.running:
            return f"{job.owner} may run {plural(quotas.running, 'job')} at a time"
        if quotas.gpus is not None and job.gpus and gpus + job.gpus > quotas.gpus:
            return f"{job.owner} may use {plural(quotas.gpus, 'GPU')} at a time"
        if quotas.disk is not None and self._disk.get(job.owner, 0) >= quotas.disk:
            return f"the jobs of {job.owner} take their {format_size(quotas.disk)} of disk; delete some"
        return None

    def take(self, job: Job) -> None:
        """Count a job that runs or starts."""
        self._jobs[job.owner] = self._jobs.get(job.owner, 0) + 1
        self._gpus[job.owner] = self._gpus.get(job.owner, 0) + job.gpus


def room_for(database: Database, settings: Settings, *, waiting: Iterable[Job], running: Sequence[Job]) -> Room:
    """Return the room that is left for the owners of the waiting jobs. A disabled owner has none."""
    quotas = dict.fromkeys((job.owner for job in waiting), default_quotas(settings))
    for row in database.read("SELECT owner, quota, value FROM own_quotas"):
        if row["owner"] in quotas:
            quotas[row["owner"]] = quotas[row["owner"]].model_copy(update={row["quota"]: row["value"]})
    for row in database.read("SELECT name FROM users WHERE disabled = 1"):
        if row["name"] in quotas:
            quotas[row["name"]] = Quotas(running=0)
    disk = {
        owner: _disk(database.read(*_disk_query(owner))) for owner, found in quotas.items() if found.disk is not None
    }
    return Room(quotas, running, disk=disk, last=last_starts(database))


def _own_query(owner: str) -> tuple[str, tuple[str]]:
    return "SELECT quota, value FROM own_quotas WHERE owner = ?", (owner,)


def _with_own(defaults: Quotas, rows: Sequence[Row]) -> Quotas:
    return defaults.model_copy(update={row["quota"]: row["value"] for row in rows})


def _count(connection: Transaction, sql: str, *values: Any) -> int:
    row = first_row(connection, sql, *values)
    return int(row["n"]) if row else 0


def _today(database: Database, owner: str) -> int:
    rows = database.read(_COUNTS["per_day"], (owner, _day()))
    return int(rows[0]["n"]) if rows else 0


def _day() -> int:
    """Return the number of today (UTC)."""
    return int(time.time() // _DAY)


def _disk_query(owner: str) -> tuple[str, tuple[str]]:
    sql = "SELECT coalesce(sum(d.bytes), 0) AS n FROM job_disk d JOIN jobs j ON j.id = d.job WHERE j.owner = ?"
    return sql, (owner,)


def _disk(rows: Sequence[Row]) -> int:
    return int(rows[0]["n"])
