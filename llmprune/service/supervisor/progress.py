"""Progress of a job, from the file that its run writes, and its result, from the report and the log."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from llmprune.publish.published import Published
from llmprune.service.jobs.job import Figures, figures_of

PROGRESS = "progress.json"
PUBLISHED = "published.json"
# The fraction of a run that is done when a step begins, and the fraction of the step itself: rough, for every model.
SHARES = {
    "starting": (0.0, 0.04),
    "plain forward pass": (0.04, 0.04),
    "pass 1": (0.08, 0.32),
    "pass 2": (0.4, 0.33),
    "saving": (0.73, 0.03),
    "verification": (0.76, 0.08),
    "evaluation": (0.84, 0.16),
    "evaluation of more samples": (0.0, 1.0),
}
_MEANING = {1: "the run failed", 2: "the recipe cannot be run as it is", 3: "the gate was not met"}
_NO_STORE = 75  # exit code of a node
_NO_STORE_ERROR = (
    "its node could not reach the artefact store for 10 minutes; its files are kept on that node; "
    "retry when the store answers"
)
_TAIL = 20_000  # bytes of the log that are searched for the error
_MAX_PROGRESS = 20_000  # bytes of the file; each of the 60 steps at most takes about a hundred

Seconds = Annotated[float, Field(ge=0, le=1e9)]


class ReportedStep(BaseModel):
    """Step in the timeline of a run. ``seconds``: spent so far; ``expected``: in all, None where unknown."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: str = Field(max_length=200)
    state: Literal["done", "reused", "current", "to come"]
    seconds: Seconds | None = None
    expected: Seconds | None = None


class ReportedTimeLeft(BaseModel):
    """Time left of a whole run; see ``common.time_left.TimeLeft``."""

    model_config = ConfigDict(allow_inf_nan=False)

    seconds: Seconds
    is_complete: bool
    is_measured: bool


class ReportedProgress(BaseModel):
    """Contents of the progress file.

    ``done`` and ``total`` count layers, ``seconds`` are those of the step so far, ``tokens`` those that the step passes
    through the model, ``run_seconds_left`` those that the whole run still takes, None where the run cannot tell;
    ``detail`` says how a training stands.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    step: str = Field(max_length=200)
    done: int | None = Field(ge=0, le=10**9)
    total: int | None = Field(ge=0, le=10**9)
    seconds: float | None = Field(ge=0, le=1e9)
    run_seconds_left: float | None = Field(None, ge=0, le=1e9)
    detail: str | None = Field(None, max_length=300)
    tokens: int | None = Field(None, ge=0, le=10**15)
    left: ReportedTimeLeft | None = None
    steps: tuple[ReportedStep, ...] = Field((), max_length=200)

    _written: float = PrivateAttr(0.0)

    @property
    def written(self) -> float:
        """When it was written, in seconds since 1970."""
        return self._written

    @property
    def fraction(self) -> float | None:
        """Fraction of the run's time that is over; None where the time left is not known."""
        if self.left is None or not (self.left.is_complete and self.left.is_measured):
            return None
        spent = sum(step.seconds or 0.0 for step in self.steps)
        return spent / (spent + self.left.seconds) if spent else None


def reported_progress(folder: Path) -> ReportedProgress | None:
    """Return what the run in a job's folder has reported last; None where it cannot be read."""
    try:
        with (folder / PROGRESS).open("rb") as file:
            reported = ReportedProgress.model_validate_json(file.read(_MAX_PROGRESS))
            reported._written = os.fstat(file.fileno()).st_mtime
            return reported
    except (OSError, ValueError):
        return None


def read_progress(folder: Path, fraction: float) -> dict[str, Any]:
    """Return the columns step, done, total, detail, fraction and those of time left; empty if unreadable.

    ``fraction`` is the last known one: it never decreases, and does not change in a step of unknown share.
    """
    progress = reported_progress(folder)
    if progress is None:
        return {}
    step, done, total, seconds = progress.step, progress.done, progress.total, progress.seconds
    begins, share = SHARES.get(re.split(r"[:(]", step)[0].strip(), (fraction, 0.0))
    by_steps = fraction if begins + share <= fraction else begins + share * ((done or 0) / total if total else 0.0)
    known = by_steps if progress.fraction is None else progress.fraction
    left = seconds / done * (total - done) if done and total and seconds else None
    return {
        "step": step,
        "done": done,
        "total": total,
        "detail": progress.detail,
        "fraction": round(max(fraction, known), 4),
        "seconds_left": round(left, 1) if left is not None else None,
        "run_seconds_left": progress.run_seconds_left,
    }


def read_published(run_folder: Path) -> str | None:
    """Return the commit that a push made on the hub, as JSON; None where the job is no push."""
    try:
        text = (run_folder / PUBLISHED).read_text(encoding="utf-8")
        return Published.model_validate_json(text).model_dump_json()
    except (OSError, ValueError):
        return None


def read_figures(run_folder: Path) -> Figures | None:
    """Return the figures of a finished run; None where its report cannot be read."""
    try:
        report = json.loads((run_folder / "report.json").read_text(encoding="utf-8"))
        return figures_of(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def explain(log: Path, code: int | None) -> str:
    """Return why an attempt failed: the last message of llmprune in the log, or the meaning of the exit code."""
    if code is None or code < 0 or code in (128 + 9, 247):
        number = f"signal {-code}" if code and code < 0 else "SIGKILL"
        return (
            f"its process was killed ({number}), as the system does when memory runs out; "
            "a retry continues after one of its last finished layers"
        )
    if code == _NO_STORE:
        return _NO_STORE_ERROR
    messages = re.findall(r"^llmprune: (.+(?:\n  - .+)*)", read_tail(log), re.MULTILINE)
    meaning = f"{_MEANING.get(code, 'the run failed')} (exit code {code}); see its log"
    return str(messages[-1]) if messages else meaning


def read_tail(log: Path, size: int = _TAIL) -> str:
    """Return the last ``size`` bytes of a log as text."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
