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
from llmprune.pipeline.scored_sizes import ablates, criteria_in, depth_target, keeps_pattern, planned_sizes
from llmprune.pipeline.step_costs import measure_step
from llmprune.results.figures.provenance import Step
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import HIDDEN_STATES, LAYER_SCORES, SCORES
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.gradients import windows_for_gradients
from llmprune.score.inputs import CalibrationBatches, RunOnBatches
from llmprune.score.scores import Scores
from llmprune.score.select import choose_cut

T = TypeVar("T")


@dataclass(frozen=True)
class ChosenCut:
    """The cut of a run, and a warning where a person edited it."""

    cut: Cut
    warnings: tuple[str, ...] = ()


def find_scores(context: RunContext) -> Scores | None:
    """Return the scores, from the run folder or computed now; None where the recipe names all that is removed.

    Those of layers by ablation are a product of their own: they depend on how many layers go, and the others do not.
    """
    origin, of_pass1 = origin_of_scores(context), origin_of_scores(context, in_pass1=True)
    if origin is None or of_pass1 is None:
        return None
    if context.search is not None and context.search.scores is not None:
        return context.search.scores
    folder = context.folder

    def make(path: Path) -> Scores:
        if is_first_process():
            shutil.rmtree(folder.path / HIDDEN_STATES, ignore_errors=True)  # of a killed run; pass 1 writes it anew
        return _saved(compute_pass1(context, scored_windows(context), steps=folder.steps), path)

    def ablate(path: Path) -> Scores:
        layers_N = _ablate(context, scored_windows(context), steps=folder.steps)
        return _saved(Scores(layers_N, {}), path)

    scores = folder.produce("scores", of_pass1, file=SCORES, load=Scores.load, make=make, together=True)
    if not ablates(context):
        return scores
    layers = folder.produce("layer scores", origin, file=LAYER_SCORES, load=Scores.load, make=ablate, together=True)
    return replace(scores, layers=layers.layers)


def _saved(scores: Scores, path: Path) -> Scores:
    if is_first_process():
        write_atomically(path, scores.save)
    return scores


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

    files = (SCORES, LAYER_SCORES) if ablates(context) else (SCORES,)
    origin = fingerprint(
        *([origin_of_scores(context)] if context.search else [file_fingerprint(folder.path / name) for name in files]),
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
    scores = compute_pass1(context, scored, steps=steps)
    return replace(scores, layers=_ablate(context, scored, steps=steps)) if ablates(context) else scores


def _ablate(context: RunContext, scored: ScoredWindows, *, steps: list[Step]) -> Tensor:
    """Score layers by ablation, float32 [N]."""
    inputs, depth, target = context.inputs, criteria_in(context).depth, depth_target(context)
    assert isinstance(depth, AblationCriterion), "only such a criterion ablates"
    apart = replace(scored, sources_N=None) if scored.combine == "pooled" else scored

    def run_ablation(batch_size: int) -> Tensor:
        with _batches(context, apart, batch_size=batch_size) as calibration:
            return layer_ablation_scores(
                inputs.dense, inputs.anatomy, criterion=depth, calibration=calibration, target=target
            )

    with measure_step(steps, "ablation", tokens=scored.windows_NL.numel(), decoder=inputs.dense):
        return context.batches.calibration.run("ablation", run_ablation, release=inputs.evict)


def compute_pass1(context: RunContext, scored: ScoredWindows, *, steps: list[Step]) -> Scores:
    """Score in pass 1 as ``compute_scores`` does; layers have no scores where their criterion ablates them."""
    inputs, criteria, target = context.inputs, criteria_in(context), depth_target(context)
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
    criteria = criteria_in(context)
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


def origin_of_scores(context: RunContext, *, in_pass1: bool = False) -> str | None:
    """Fingerprint of everything that the scores depend on, or those of pass 1; None where nothing is scored."""
    recipe, plan, inputs = context.recipe, context.plan, context.inputs
    criteria = criteria_in(context)
    if not criteria:
        return None
    depth = None if in_pass1 and ablates(context) else criteria.depth
    parts = (depth, criteria.width, criteria.heads, criteria.experts)
    horizon = depth.horizon(plan.dense.layers - plan.keep_layers) if depth else None
    scored, text = scored_windows(context), inputs.windows_fingerprint
    by_source = () if scored.sources_N is None else (scored.combine, scored.sources_N.tolist())
    hidden = ("hidden",) if criteria.hidden else ()
    unseen = () if context.search is None else (context.search.judged_N.tolist(),)
    merges = ("merge",) if criteria.merges_experts else ()
    own = (*parts, *hidden, *by_source, *unseen, *merges)
    return fingerprint(inputs.identity, text, horizon, keeps_pattern(recipe), *own)
