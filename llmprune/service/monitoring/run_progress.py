"""Progress of a job as people read it: its steps as a timeline, the time left, the current layer, the throughput."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from llmprune.common.time_left import rough_duration
from llmprune.results.formatting import number
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.run_times import RunTimes
from llmprune.service.monitoring.queue_estimate import QueuePlace
from llmprune.service.supervisor.progress import (
    ReportedProgress,
    ReportedStep,
    ReportedTimeLeft,
    reported_progress,
)

# Steps in words; a step that is not listed has its own name.
WORDS = {
    "planning": "Plan",
    "reading text": "Read text and model",
    "self-generated windows": "Write text with the dense model",
    "self-generated windows for recover": "Write text for the training",
    "plain forward pass": "Time a forward pass",
    "speed table": "Measure speeds of shapes",
    "layer order": "Order the layers",
    "search": "Search the shape",
    "pass 1": "Score",
    "ablation": "Score layers by leaving them out",
    "calibration check": "Check the calibration text",
    "pass 2": "Cut and repair",
    "saving": "Save",
    "verification": "Verify the saved model",
    "recovery": "Recover by training",
    "verification of the trained model": "Verify the trained model",
    "vocabulary": "Cut the vocabulary",
    "evaluation": "Evaluate",
    "evaluation of more samples": "Evaluate more samples",
    "tasks": "Evaluate tasks",
    "GGUF files": "Write GGUF files",
    "report": "Write the report",
}
_PER_TOKENS = ("pass 1: scoring layers", "pass 2", "recovery: training")  # each item takes all tokens
# Of an estimate that no measurement has confirmed. It counts the load of the machine, which changes: with five programs
# for each processor a run took 1.7 times as long as estimated.
_LOW, _HIGH = 0.6, 2.5


class TimelineStep(BaseModel):
    """Step of a run."""

    name: str = Field(description="Name of the step in the report.")
    words: str = Field(description="The step in words.")
    state: Literal["done", "reused", "current", "to come"]
    seconds: float | None = Field(description="Seconds spent in it; null: it has not begun.")
    expected_seconds: float | None = Field(description="Seconds that it should take in all; null: not known.")
    fraction: float | None = Field(None, description="Fraction of the current step that is done; null: not known.")


class TimeLeft(BaseModel):
    """Time left of a whole run."""

    kind: Literal["measured", "measuring", "at least", "unknown"] = Field(
        description="measured: from measured rates. measuring: estimated, and no step has confirmed it yet. at least: "
        "a step to come has no estimate. unknown: there is no estimate."
    )
    seconds: float | None = Field(None, description="Seconds left; null: not known.")
    shortest: float | None = Field(None, description="Lower end of the range while it is measured; null: no range.")
    longest: float | None = Field(None, description="Upper end of the range; null: no range.")
    words: str = Field(description="The same in words.")


class RunProgress(BaseModel):
    """Progress of a job."""

    model_config = ConfigDict(frozen=True)

    steps: list[TimelineStep] = Field(description="Steps of this run, in their order; empty before it has begun.")
    left: TimeLeft | None = Field(description="Time left of the whole run; null: the job does not run.")
    item: Literal["layer", "step"] = Field(description="What done and total of the job count.")
    items_per_minute: float | None = Field(description="Layers or training steps per minute in the current step.")
    tokens_per_second: float | None = Field(description="Tokens through the model per second; null: not measured.")
    queue: QueuePlace | None = Field(description="Place in the queue; null: the job does not wait.")

    @property
    def throughput(self) -> str:
        """Throughput in words, such as ``12 layers/min, 1,234 tokens/s``; empty where it is not measured."""
        found = []
        if self.items_per_minute is not None:
            found.append(f"{number(round(self.items_per_minute, 1))} {self.item}s/min")
        if self.tokens_per_second is not None:
            found.append(f"{number(round(self.tokens_per_second))} tokens/s")
        return ", ".join(found)


def progress_of(job: Job, folder: Path, *, earlier: RunTimes | None, queue: QueuePlace | None = None) -> RunProgress:
    """Return the progress of a job in its folder. ``earlier``: run times of its kind."""
    reported = reported_progress(folder) if job.state != "queued" else None
    is_running = job.state in ("running", "cancelling")
    age = max(0.0, time.time() - reported.written) if reported is not None and is_running else 0.0
    shown = reported.steps if reported is not None else ()
    steps = [_shown(step, reported, age=age) for step in shown if reported is not None]
    return RunProgress(
        steps=_without_future(steps) if job.ended else steps,
        left=_left(job, _aged(reported, age), earlier=earlier) if is_running else None,
        item="step" if job.detail else "layer",
        items_per_minute=_per_second(reported, reported.done if reported else None, scale=60) if is_running else None,
        tokens_per_second=_tokens_per_second(reported) if is_running else None,
        queue=queue,
    )


def _aged(reported: ReportedProgress | None, age: float) -> ReportedTimeLeft | None:
    """Return the time left some seconds after it was reported; the steps to come stay to be done."""
    if reported is None or reported.left is None:
        return None
    ahead = sum(step.expected or 0.0 for step in reported.steps if step.state == "to come")
    seconds = max(reported.left.seconds - age, min(ahead, reported.left.seconds))
    return reported.left.model_copy(update={"seconds": seconds})


def _shown(step: ReportedStep, reported: ReportedProgress, *, age: float) -> TimelineStep:
    """Return a step some seconds after it was reported."""
    fraction = None
    is_current = step.state == "current"
    if is_current and reported.total and reported.done is not None:
        fraction = round(min(reported.done / reported.total, 1.0), 4)
    return TimelineStep(
        name=step.name,
        words=WORDS.get(step.name, step.name[:1].upper() + step.name[1:]),
        state=step.state,
        seconds=round(step.seconds + age, 1) if is_current and step.seconds is not None else step.seconds,
        expected_seconds=step.expected,
        fraction=fraction,
    )


def _without_future(steps: list[TimelineStep]) -> list[TimelineStep]:
    """Return the steps of a run that has ended: the last one is done, and none is to come."""
    begun = [step for step in steps if step.state != "to come"]
    return [step.model_copy(update={"state": "done"}) if step.state == "current" else step for step in begun]


def _left(job: Job, left: ReportedTimeLeft | None, *, earlier: RunTimes | None) -> TimeLeft:
    """Return the time left of a running job: by the run itself, else by earlier jobs of its kind."""
    if left is not None and left.is_complete:
        if left.is_measured:
            return TimeLeft(kind="measured", seconds=left.seconds, words=f"about {rough_duration(left.seconds)} left")
        low, high = _LOW * left.seconds, _HIGH * left.seconds
        words = f"measuring: between {rough_duration(low)} and {rough_duration(high)} left"
        return TimeLeft(kind="measuring", seconds=left.seconds, shortest=low, longest=high, words=words)
    if earlier is not None and job.ran_before == 0 and job.attempts == 1:
        low, high = (max(seconds - job.ran_seconds, 0.0) for seconds in (earlier.shortest, earlier.longest))
        last = max(earlier.last - job.ran_seconds, 0.0)
        words = f"about {rough_duration(last)} left, as long as the last run of this recipe"
        return TimeLeft(kind="measured", seconds=last, shortest=low, longest=high, words=words)
    if left is not None:
        words = f"at least {rough_duration(left.seconds)} left; a step to come has no estimate"
        return TimeLeft(kind="at least", seconds=left.seconds, words=words)
    return TimeLeft(kind="unknown", words="starting; the time left is known within a minute or so")


def _per_second(reported: ReportedProgress | None, amount: float | None, *, scale: float = 1.0) -> float | None:
    if reported is None or not reported.seconds or not reported.done or not amount:
        return None
    return round(scale * amount / reported.seconds, 3)


def _tokens_per_second(reported: ReportedProgress | None) -> float | None:
    if reported is None or not reported.tokens or not reported.total or not reported.step.startswith(_PER_TOKENS):
        return None
    return _per_second(reported, reported.tokens * (reported.done or 0) / reported.total)
