"""Sentences on what a pruned model has kept, for people who never read a report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmprune.results.figures.evaluation import DivergenceFigures, GenerationFigures, PerplexityFigures, TaskFigures
from llmprune.results.formatting import number, percent, plural, span
from llmprune.service.api.dependencies import Service
from llmprune.service.jobs.follow_ups.reevaluation import report_of
from llmprune.service.jobs.job import FINISHED, Figures, Job
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.web.new_job.repairs import LOOK, repair_of

_LITTLE, _MUCH = 0.95, 0.8  # of what is kept: more is little lost, less is much lost
_WIDE = 0.1  # of an interval of the scores
_MOST_TASKS = 8  # that are listed
_SHARES = ("acc", "exact_match", "em", "prompt_level", "inst_level")  # beginnings of metrics that count right answers


@dataclass(frozen=True)
class Kept:
    """Sentences on the quality that a model kept. ``headline``: on the measure that counts; ``advice``: on the loss."""

    headline: str
    sentences: tuple[str, ...]
    advice: str
    is_first_look: bool


def kept_of(service: Service, job: Job) -> Kept | None:
    """Return what the model of a finished job has kept; None where it has no model, or its report cannot be read."""
    if job.state not in FINISHED or job.figures is None:
        return None
    try:
        report = report_of(job, service.settings)
        found = _Measured.of(report)
        return Kept(
            headline=_headline(job.figures, found),
            sentences=tuple(found.sentences()),
            advice=_advice(found.shares(job.figures), figures=job.figures),
            is_first_look=_is_first_look(report),
        )
    except (Conflict, KeyError, TypeError, AttributeError, ArithmeticError, ValueError):
        return None


@dataclass(frozen=True)
class _Measured:
    """Parts of a report."""

    perplexity: PerplexityFigures | None
    divergence: DivergenceFigures | None
    tasks: tuple[TaskFigures, ...]
    generation: GenerationFigures | None

    @classmethod
    def of(cls, report: dict[str, Any]) -> _Measured:
        """Read a report's JSON data. Raises ValidationError, and others for a report of another kind."""
        perplexity, divergence = report["perplexity"], report.get("divergence")
        generation = report.get("generation")
        return cls(
            perplexity and PerplexityFigures.model_validate(perplexity, strict=False),
            divergence and DivergenceFigures.model_validate(divergence, strict=False),
            tuple(TaskFigures.model_validate(task, strict=False) for task in report["tasks"]),
            generation and GenerationFigures.model_validate(generation, strict=False),
        )

    def shares(self, figures: Figures) -> list[float]:
        """Return the fractions of the dense model's quality that were kept: of its scores and of its probabilities."""
        text = self.perplexity.dense / self.perplexity.pruned if self.perplexity else None
        return [share for share in (figures.retention, text) if share is not None and math.isfinite(share)]

    def sentences(self) -> Iterator[str]:
        """Yield a sentence for each measure."""
        if self.perplexity:
            dense, pruned = self.perplexity.dense, self.perplexity.pruned
            yield (
                f"On text that it never saw it gives the right next word {percent(dense / pruned, 0)} of the "
                f"probability that the original gives it (perplexity {number(pruned)}, original {number(dense)}; lower "
                "is better)."
            )
        if self.divergence:
            yield (
                "There its first choice for the next word is the original's in "
                f"{percent(self.divergence.same_first, 0)} of the places."
            )
        yield from map(_task, self.tasks[:_MOST_TASKS])
        if len(self.tasks) > _MOST_TASKS:
            yield f"{len(self.tasks) - _MOST_TASKS} more tasks are in the report."
        if self.generation:
            yield _loops(self.generation)


def _headline(figures: Figures, found: _Measured) -> str:
    """Return what was kept and how much smaller the model is, such as ``Keeps 93% of … and is 25% smaller``."""
    smaller = percent(1 - figures.parameters[1] / figures.parameters[0], 0)
    if figures.retention is not None:
        kept = f"It keeps {percent(figures.retention)} of the original's scores"
        if figures.interval and figures.confidence:
            low, high = figures.interval
            kept += f" ({percent(low)} to {percent(high)} with {percent(figures.confidence, 0)} confidence)"
    elif found.perplexity:
        sure = percent(found.perplexity.dense / found.perplexity.pruned, 0)
        kept = f"It is {sure} as sure of the next word as the original"
    else:
        kept = "Nothing has measured what it keeps"
    return f"{kept}, with {smaller} fewer parameters."


def _task(task: TaskFigures) -> str:
    """Return a sentence on a task, such as ``arc_easy: 58.0% right, original 62.0%: keeps 93.5%, 200 samples.``."""
    if task.metric.startswith(_SHARES):
        scores = f"{percent(task.pruned)} right, original {percent(task.dense)}"
    else:
        better = "higher" if task.higher_is_better else "lower"
        scores = f"{task.metric} {number(task.pruned)}, original {number(task.dense)}, {better} is better"
    kept = "" if task.retention is None else f": keeps {percent(task.retention)}"
    interval = f" ({span(task.interval)})" if kept and task.interval else ""
    return f"Task {task.task}: {scores}{kept}{interval}, {plural(task.samples, 'sample')}."


def _loops(found: GenerationFigures) -> str:
    looping, before = (round(one.loops * found.samples) for one in (found.pruned, found.dense))
    own = f"{looping} of {found.samples}" if looping else f"none of {found.samples}"
    return f"Of the texts that it wrote, {own} end in a loop (original: {before or 'none'})."


def _advice(shares: list[float], *, figures: Figures) -> str:
    """Return how much was lost, by the measure that shows most, and what to do next."""
    if figures.retention is None:
        more = "No task has measured it yet: evaluate one under What next before you decide."
    elif figures.interval and figures.interval[1] - figures.interval[0] > _WIDE:
        more = "The tasks had few samples, so their figure may be off: evaluate more under What next."
    else:
        more = ""
    least = min(shares, default=None)
    if least is None:
        lost = ""
    elif least >= _LITTLE:
        lost = "Little was lost."
    elif least >= _MUCH:
        lost = "Some was lost. Training on more tokens, or keeping more, gets some of it back."
    else:
        where = " on text, more than the tasks show" if least < _MUCH <= max(shares) else ""
        lost = (
            f"Much was lost{where}: train it on more tokens, keep a larger share, or prune it with more text of the "
            "kind that it will be used on."
        )
    return f"{lost} {more}".strip()


def _is_first_look(report: dict[str, Any]) -> bool:
    recipe = report.get("recipe")
    return isinstance(recipe, dict) and repair_of(recipe) == LOOK
