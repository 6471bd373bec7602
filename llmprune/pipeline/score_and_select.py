"""Pass 1 of a run and its result: scores, and the cut that they select."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from llmprune.common.distributed import is_first_process
from llmprune.common.files import write_atomically
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.combine import Combine
from llmprune.cut.decision import Cut
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.step_costs import measure_step
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.provenance import Step
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import HIDDEN_STATES
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.gradients import windows_for_gradients
from llmprune.score.inputs import CalibrationBatches, DepthTarget, RunOnBatches, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut

T = TypeVar("T")


@dataclass(frozen=True)
class ChosenCut:
    """The cut of a run, and a warning where a person edited it."""

    cut: Cut
    warnings: tuple[str, ...] = ()


def find_scores(context: RunContext) -> Scores | None:
    """Return the scores, from the run folder or computed now; None where the recipe names all that is removed."""
    origin = origin_of_scores(context)
    if origin is None:
        return None
    if context.search is not None and context.search.scores is not None:
        return context.search.scores
    folder = context.folder

    def make(path: Path) -> Scores:
        if is_first_process():
            shutil.rmtree(
                folder.path / HIDDEN_STATES, ignore_errors=True
            )  # left by a killed run; pass 1 writes it anew
        scores = compute_scores(context, scored_windows(context), steps=folder.steps)
        if is_first_process():
            write_atomically(path, scores.save)
        return scores

    return folder.produce("scores", origin, file="scores.safetensors", load=Scores.load, make=make, together=True)


def find_cut(context: RunContext, scores: Scores | None) -> ChosenCut:
    """Return the cut that the scores select, or the one in the run folder, which a person may have edited.

    A member of a family has no file of scores: its cut depends on what they depend on. Raises RecipeError where the
    edited cut does not fit the plan.
    """
    folder = context.folder
    chosen = choose_cut(context.inputs.anatomy, scores, sizes=planned_sizes(context))
    if (vocabulary := context.inputs.texts.vocabulary) is not None:
        chosen = replace(chosen, vocabulary=vocabulary.keep_K)

    def make(path: Path) -> Cut:
        chosen.save(path, reason=context.search.reason if context.search else None)
        return chosen

    origin = fingerprint(
        file_fingerprint(folder.path / "scores.safetensors") if context.search is None else origin_of_scores(context),
        chosen.widths,
        chosen.num_experts,
        chosen.kv_groups,
        chosen.layers,
        *([] if chosen.hidden is None else [chosen.hidden_size]),
        *(["merged"] if chosen.merged else []),
        *([] if chosen.vocabulary is None else [chosen.vocabulary.tolist()]),
    )
    cut = folder.produce("cut", origin, file="cut.json", load=Cut.load, make=make)
    cut.require_like(chosen)
    if cut.layers == chosen.layers:
        return ChosenCut(cut)
    warning = f"cut.json was edited: it removes layers {list(cut.removed)}, the scores chose {list(chosen.removed)}"
    return ChosenCut(cut, (warning,))


@dataclass(frozen=True)
class ScoredWindows:
    """Windows [N, L] to score on; ``sources_N``: the source of each, from 0, whose scores ``combine`` combines.

    Where they are pooled, source 0 is the text that was read, and 1 what the dense model wrote itself. ``generated_N``:
    True for the latter, bool [N].
    """

    windows_NL: Tensor
    sources_N: Tensor | None = None
    combine: Combine = "pooled"
    generated_N: Tensor | None = None

    def at(self, numbers_N: Tensor) -> ScoredWindows:
        """Return some of the windows, by their numbers; sources without any are not counted."""
        sources_N = None
        if self.sources_N is not None:
            sources_N = torch.unique(self.sources_N[numbers_N], return_inverse=True)[1]
        generated_N = None if self.generated_N is None else self.generated_N[numbers_N]
        return ScoredWindows(self.windows_NL[numbers_N], sources_N, self.combine, generated_N)


def scored_windows(context: RunContext) -> ScoredWindows:
    """Return the calibration windows that scores see, and their sources where their scores are combined.

    They are all, but for those that judge the shapes of a search.
    """
    inputs, combine = context.inputs, context.recipe.calibration.combine
    pooled_N = None if inputs.generated is None else inputs.generated.long()
    sources_N = pooled_N if combine == "pooled" else inputs.sources
    return _without_judged(context, ScoredWindows(inputs.windows, sources_N, combine, inputs.generated))


def windows_by_source(context: RunContext) -> ScoredWindows:
    """Return the windows that scores see, with their sources, whose scores are summed apart."""
    inputs = context.inputs
    return _without_judged(context, ScoredWindows(inputs.windows, inputs.sources, "rank_mean", inputs.generated))


def _without_judged(context: RunContext, windows: ScoredWindows) -> ScoredWindows:
    if context.search is None:
        return windows
    seen_N = torch.ones(len(windows.windows_NL), dtype=torch.bool)
    seen_N[context.search.judged_N] = False
    return windows.at(seen_N.nonzero().squeeze(1))


def compute_scores(context: RunContext, scored: ScoredWindows, *, steps: list[Step]) -> Scores:
    """Score layers, neurons, heads and experts as the recipe says; append the costs to ``steps``.

    Where a device runs out of memory, a step is repeated with half the batch.
    """
    inputs, depth, target = context.inputs, _criteria_of(context).depth, _depth_target(context)
    scores = compute_pass1(context, scored, steps=steps)
    if not isinstance(depth, AblationCriterion):
        return scores
    apart = replace(scored, sources_N=None) if scored.combine == "pooled" else scored

    def run_ablation(batch_size: int) -> Tensor:
        with _batches(context, apart, batch_size=batch_size) as calibration:
            return layer_ablation_scores(
                inputs.dense, inputs.anatomy, criterion=depth, calibration=calibration, target=target
            )

    with measure_step(steps, "ablation", tokens=scored.windows_NL.numel(), decoder=inputs.dense):
        layers_N = context.batches.calibration.run("ablation", run_ablation, release=inputs.evict)
    return replace(scores, layers=layers_N)


def compute_pass1(context: RunContext, scored: ScoredWindows, *, steps: list[Step]) -> Scores:
    """Score in pass 1 as ``compute_scores`` does; layers have no scores where their criterion ablates them."""
    inputs, criteria, target = context.inputs, _criteria_of(context), _depth_target(context)
    own_N = windows_for_gradients(criteria, len(scored.windows_NL), generated_N=scored.generated_N)
    if not len(own_N):
        criteria = criteria.in_forward

    def run_pass1(batch_size: int) -> Scores:
        with _batches(context, scored, batch_size=batch_size) as calibration:
            calibration = replace(calibration, gradients=_on_own_windows(context, scored, numbers_N=own_N))
            return score(inputs.dense, inputs.anatomy, criteria=criteria, calibration=calibration, target=target)

    with measure_step(steps, "pass 1", tokens=scored.windows_NL.numel(), decoder=inputs.dense):
        return context.batches.calibration.run("pass 1", run_pass1, release=inputs.evict)


def is_scored_in_pass1(context: RunContext) -> bool:
    """Check whether pass 1 scores anything: layers that are not ablated, neurons, heads or experts."""
    criteria = _criteria_of(context)
    depth = None if isinstance(criteria.depth, AblationCriterion) else criteria.depth
    return bool(replace(criteria, depth=depth))


@contextmanager
def _batches(context: RunContext, scored: ScoredWindows, *, batch_size: int) -> Iterator[CalibrationBatches]:
    """Yield the batches for one attempt of a step.

    The cache of hidden states is kept for pass 2, but not that of a failed attempt, nor of a part of the windows.
    """
    windows_NL = scored.windows_NL
    store = context.inputs.hidden_state_store(context.folder.path, batch_size, windows_NL=windows_NL)
    for_pass2 = False
    try:
        sources, begin = (scored.sources_N, scored.combine), context.inputs.calibration_text.begin
        yield CalibrationBatches(windows_NL, batch_size, store, begin, *sources)
        for_pass2 = len(windows_NL) == len(context.inputs.windows)
    finally:
        if store.cache is not None and not for_pass2:
            store.cache.remove()


def _on_own_windows(context: RunContext, scored: ScoredWindows, *, numbers_N: Tensor) -> RunOnBatches | None:
    """Return how the backward pass is run on windows of its own, by their numbers; None where it has all or none.

    Its batches are halved by themselves, and their hidden states are not kept.
    """
    if not len(numbers_N) or torch.equal(numbers_N, torch.arange(len(scored.windows_NL))):
        return None

    def run(work: Callable[[CalibrationBatches], T]) -> T:
        def run_gradients(batch_size: int) -> T:
            with _batches(context, ScoredWindows(scored.windows_NL[numbers_N]), batch_size=batch_size) as batches:
                return work(batches)

        part = context.batches.calibration.of_part()
        return part.run("pass 1: gradients", run_gradients, release=context.inputs.evict)

    return run


def origin_of_scores(context: RunContext) -> str | None:
    """Fingerprint of everything that the scores depend on; None where nothing is scored."""
    recipe, plan, inputs = context.recipe, context.plan, context.inputs
    criteria = _criteria_of(context)
    parts = (criteria.depth, criteria.width, criteria.heads, criteria.experts)
    if not criteria:
        return None
    horizon = criteria.depth.horizon(plan.dense.layers - plan.keep_layers) if criteria.depth else None
    scored, text = scored_windows(context), inputs.windows_fingerprint
    by_source = () if scored.sources_N is None else (scored.combine, scored.sources_N.tolist())
    hidden = ("hidden",) if criteria.hidden else ()
    unseen = () if context.search is None else (context.search.judged_N.tolist(),)
    merges = ("merge",) if criteria.merges_experts else ()
    own = (*parts, *hidden, *by_source, *unseen, *merges)
    return fingerprint(inputs.identity, text, horizon, _keeps_pattern(recipe), *own)


def planned_sizes(context: RunContext) -> PlannedSizes:
    """Return the sizes that the plan sets for the cut."""
    plan = context.plan
    return PlannedSizes(
        removed_layers=plan.removed_layers,
        keep_layers=plan.keep_layers,
        widths=plan.keep_widths,
        num_experts=plan.keep_experts,
        kv_groups=plan.keep_kv_groups,
        hidden_size=plan.keep_hidden,
        merge_experts=_merges_experts(context.recipe),
        keep_pattern=_keeps_pattern(context.recipe),
    )


def _criteria_of(context: RunContext) -> ScoringCriteria:
    return criteria_of(context.recipe) if context.search is None else context.search.criteria


def criteria_of(recipe: Recipe) -> ScoringCriteria:
    """Return the criteria of all that a recipe cuts by scores."""
    width = recipe.width
    return ScoringCriteria(
        depth=recipe.layer_criterion,
        width=width.neuron_criterion if width and width.cuts_mlp else None,
        heads=width.head_criterion if width and width.heads is not None else None,
        experts=recipe.experts.criterion if recipe.experts else None,
        hidden=recipe.hidden is not None,
        merges_experts=_merges_experts(recipe),
    )


def _depth_target(context: RunContext) -> DepthTarget:
    return DepthTarget(context.plan.dense.layers - context.plan.keep_layers, _keeps_pattern(context.recipe))


def _merges_experts(recipe: Recipe) -> bool:
    return recipe.experts is not None and recipe.experts.method == "merge"


def _keeps_pattern(recipe: Recipe) -> bool:
    return bool(recipe.depth and recipe.depth.keep_pattern)
