"""Outcome of an attempt, from its exit code, its report and its log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmprune.service.jobs.job import VERDICTS, Job, Outcome
from llmprune.service.supervisor.progress import explain, read_figures, read_published

RECIPE_WRONG, GATE_NOT_MET = 2, 3  # exit codes of llmprune


@dataclass(frozen=True)
class EndedAttempt:
    """An attempt that has ended."""

    job: Job
    code: int | None  # None: it was killed
    ran_seconds: float  # of all attempts at the job
    time_limit: float  # seconds; infinite: no limit
    overuse: str | None  # why the supervisor ended it, where it was above a limit
    log: Path
    run_folder: Path


def outcome_of(ended: EndedAttempt) -> Outcome:
    """Return the outcome. A run that finished before its cancellation or its limit took effect keeps its result."""
    code = ended.code
    figures = read_figures(ended.run_folder) if code in (0, GATE_NOT_MET) else None
    results = {"figures": figures.model_dump_json() if figures else None}
    if code == 0:
        return Outcome("succeeded", code, results=results | {"published": read_published(ended.run_folder)})
    verdict = figures.gate_verdict if figures else None
    if code == GATE_NOT_MET and verdict not in (None, "pass"):
        assert verdict is not None, "checked above"
        return Outcome(VERDICTS[verdict], code, explain(ended.log, code), results)
    if code not in (RECIPE_WRONG, GATE_NOT_MET):
        if ended.job.state == "cancelling":
            return Outcome("cancelled", code)
        if ended.overuse is not None:
            return Outcome("failed", code, ended.overuse)
        if ended.ran_seconds - ended.job.ran_before > ended.time_limit:
            limit = f"its limit of {ended.time_limit:,.15g} s"
            return Outcome("failed", code, f"it ran longer than {limit}; a retry continues after the last layer")
    return Outcome("failed", code, explain(ended.log, code))
