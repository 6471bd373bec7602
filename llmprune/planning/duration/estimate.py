"""Durations of a run's parts, estimated from their operations and bytes and from the measured rates of the device."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.common.time_left import ExpectedPart
from llmprune.planning.duration.evaluation import evaluation_parts, verification_work
from llmprune.planning.duration.generating import RECOVERY_GENERATED, SELF_GENERATED, self_generated_parts
from llmprune.planning.duration.operations import Work
from llmprune.planning.duration.parts import Part, PlannedModels, RunWork, Tokens, forward_work, visited
from llmprune.planning.duration.pass2 import pass2_part
from llmprune.planning.duration.rates import Rates
from llmprune.planning.duration.recovering import VERIFIED_AGAIN
from llmprune.planning.duration.scoring import calibration_check_work, scoring_parts
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.base import Figures

LOADING = 10.0  # seconds in which a process loads torch and transformers, where it was not measured


class PartDuration(Figures):
    """Estimated duration of one part of a run."""

    step: str  # of the report
    name: str  # in reports of progress
    seconds: float | None  # None: not known before the run
    items: int | None = None  # layers that its progress counts


class Durations(Figures):
    """Estimated durations of a run's parts, in their order, and the device that they were estimated for.

    ``slowdown``: factor on the time of a machine that does nothing else, for the programs that run beside.
    """

    parts: tuple[PartDuration, ...]
    total: float  # seconds of all parts that have an estimate
    dominant: str | None  # the step that takes longest of those with an estimate
    device: str
    processes: int
    slowdown: float = 1.0
    rates: Rates

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the parts without an estimate."""
        return tuple(part.name for part in self.parts if part.seconds is None)

    def by_step(self) -> dict[str, float]:
        """Return the seconds of each step, without the parts that have no estimate."""
        return _by_step(self.parts)

    def expected(self) -> tuple[ExpectedPart, ...]:
        """Return the parts for the forecast of the time left."""
        return tuple(ExpectedPart(part.step, part.name, part.seconds, part.items) for part in self.parts)


def _by_step(parts: Sequence[PartDuration]) -> dict[str, float]:
    """Return the seconds of each step, without the parts that have no estimate."""
    steps: dict[str, float] = {}
    for part in parts:
        if part.seconds is not None:
            steps[part.step] = steps.get(part.step, 0.0) + part.seconds
    return steps


def run_work(recipe: Recipe, models: PlannedModels, *, recovery: Sequence[Part] = ()) -> RunWork:
    """Return the work of a recipe's run. ``recovery``: the parts of the training after the cut."""
    tokens = Tokens.of(recipe, models)
    costs = models.dense_costs(tokens.length)
    outside = models.pruned_bytes - sum(cost.bytes for cost in models.pruned_costs(tokens.length))
    saving = Work(files=models.pruned_bytes + max(outside, 0))
    early = recipe.recover is not None and recipe.recover.tokens is not None  # hours are counted after pass 2
    written = [part for part in recovery if early and part.step == RECOVERY_GENERATED]
    verified = verification_work(models, tokens)
    if recipe.cuts_only_vocabulary:
        pruning = []
    else:
        pruning = [
            pass2_part(recipe, models),
            Part(step="saving", name="saving", work=saving),
            Part(step="verification", name="verification", work=verified),
        ]
    cut = [Part(step="vocabulary", name="vocabulary", work=saving + verified)] if recipe.vocabulary else []
    trained = [Part(step=VERIFIED_AGAIN, name=VERIFIED_AGAIN, work=verified)] if recovery else []
    return RunWork(
        hidden=models.hidden,
        forward=forward_work(costs, tokens) + visited(costs),
        check=calibration_check_work(recipe, models),
        parts=(
            *self_generated_parts(recipe, models),
            *written,
            *scoring_parts(recipe, models),
            *pruning,
            *(part for part in recovery if part not in written),
            *trained,
            *cut,
            *evaluation_parts(recipe, models),
        ),
    )


def parts_with(work: RunWork, *, measures_forward: bool, checks_calibration: bool) -> tuple[Part, ...]:
    """Return the parts of a run with those that the options of the command add."""
    scoring = [part for part in work.parts if part.step in ("pass 1", "ablation")]
    evaluation = [part for part in work.parts if part.step == "evaluation"]
    written = [part for part in work.parts if part.step in (SELF_GENERATED, RECOVERY_GENERATED)]
    pruning = [part for part in work.parts if part not in (*written, *scoring, *evaluation)]
    forward, check = [], []
    if measures_forward:
        forward = [Part(step="plain forward pass", name="plain forward pass", work=work.forward, shared=True)]
    if checks_calibration and work.check is not None:
        check = [Part(step="calibration check", name="calibration check", work=work.check, shared=True)]
    return (*written, *forward, *scoring, *check, *pruning, *forward, *evaluation)


def durations(
    parts: Sequence[Part],
    rates: Rates,
    *,
    device: str,
    processes: int,
    slowdown: float = 1.0,
    loading: float | None = None,
) -> Durations:
    """Return the durations of the parts of a run.

    ``slowdown``: by other programs on the machine. ``loading``: seconds in which a process loads the libraries, None
    where it was not measured.
    """
    loading = LOADING if loading is None else loading

    def estimate(part: Part) -> float | None:
        if part.work is None:
            return None
        among = processes if part.shared else 1
        return round(seconds_of(part.work, rates, processes=among, loading=loading, slowdown=slowdown), 3)

    found = tuple(
        PartDuration(
            step=part.step,
            name=part.name,
            seconds=estimate(part),
            items=part.items,
        )
        for part in parts
    )
    total, dominant = summed(found)
    return Durations(
        parts=found,
        total=total,
        dominant=dominant,
        device=device,
        processes=processes,
        slowdown=slowdown,
        rates=rates,
    )


def summed(parts: Sequence[PartDuration]) -> tuple[float, str | None]:
    """Return the seconds of all parts that have an estimate, and the step that takes longest of them."""
    steps = _by_step(parts)
    return round(sum(steps.values()), 3), max(steps, key=steps.__getitem__, default=None)


def seconds_of(work: Work, rates: Rates, *, processes: int, loading: float, slowdown: float = 1.0) -> float:
    """Return the seconds that a part takes where so many processes divide its tokens.

    ``slowdown``: of all but files, by other programs.
    """
    divided = (
        work.products / rates.products
        + work.plain_products / rates.plain_products
        + work.sums / rates.sums
        + work.stream / rates.stream
        + work.narrow / rates.narrow
        + work.calls * rates.call
    )
    alone = work.solves / rates.sums + work.weights / rates.copies + work.starts * loading
    return (divided / processes + alone) * slowdown + work.files / rates.files + work.seconds
