"""Decision which waiting jobs start with another job's scores, and which wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.results.run_folder.earlier_products import has_scores
from llmprune.service.jobs.job import ACTIVE, FINISHED, Job
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.sweeps.shared_scores import WAITS, Member, groups_that_wait
from llmprune.service.settings import Settings


@dataclass
class _Group:
    """Jobs that need the same scores. ``source``: one that has them; ``scoring``: one that makes them."""

    source: str | None = None
    scoring: str | None = None
    needs_none: bool = False  # a finished job of the group has none


class ScoreSharing:
    """Jobs of a sweep that need the same scores: the first scores the model, the others wait until it has.

    They wait for no job that has ended without a result: the next one then scores the model.
    """

    def __init__(self, settings: Settings, jobs: JobStore) -> None:
        self._settings, self._jobs = settings, jobs

    def choose(self, waiting: Sequence[Job]) -> tuple[list[Job], dict[str, str]]:
        """Return the jobs that wait for no scores, and by job the one whose scores it takes.

        ``waiting``: in the order in which they should start. A job that has to wait says so in its step.
        """
        found = groups_that_wait(self._jobs.database) if waiting else {}
        groups: dict[str, _Group] = {}
        for members in found.values():
            groups |= dict.fromkeys((member.id for member in members), self._group(members))
        ready, sources = list[Job](), dict[str, str]()
        for job in waiting:
            group = groups.get(job.id)
            waits_for = None
            if group is not None and not self._has_own(job) and not group.needs_none:
                if group.source is not None:
                    sources[job.id] = group.source
                else:
                    waits_for, group.scoring = group.scoring, group.scoring or job.id
            self._tell(job, waits_for)
            if waits_for is None:
                ready.append(job)
        return ready, sources

    def _group(self, members: Sequence[Member]) -> _Group:
        group = _Group()
        for member in members:
            is_scored = member.state in (*ACTIVE, *FINISHED) and has_scores(self._settings.run_folder(member.id))
            if is_scored and member.state != "cancelling":
                group.source = group.source or member.id
            elif member.state in FINISHED:
                group.needs_none = True
            elif member.state in ACTIVE:
                group.scoring = group.scoring or member.id
        return group

    def _has_own(self, job: Job) -> bool:
        """Return whether a job needs no other one's scores any more: it has begun with some, or made its own."""
        has_begun = job.attempts > 0 and has_scores(self._settings.run_folder(job.id))
        return job.reads is not None or job.reevaluate is not None or has_begun

    def _tell(self, job: Job, waits_for: str | None) -> None:
        """Write what a job waits for into its step, once."""
        step = job.step if job.step is None or not job.step.startswith(WAITS) else None
        if waits_for is not None:
            step = f"{WAITS} {waits_for}"
        if step != job.step:
            self._jobs.progress(job.id, job.ran_seconds, news={"step": step})
