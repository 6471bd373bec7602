"""The first half of a run: scores, the cut that they choose, and whether it hangs on the calibration text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from llmprune.common.distributed import count, is_first
from llmprune.common.errors import CalibrationError
from llmprune.common.files import write_beside
from llmprune.criteria.base import (
    DepthCriterion,
    ExpertCriterion,
    PassingCriterion,
    TrialCriterion,
    WidthCriterion,
)
from llmprune.cut.decision import Cut
from llmprune.layerwise.hidden_states import HiddenStateStore
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.step_costs import account
from llmprune.planning.plan import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.results.formatting import plural
from llmprune.results.run_folder import TRAIL, RunFolder, file_fingerprint, fingerprint
from llmprune.results.schema import StabilityFigures, Step
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.score.stability import compare


def find_scores(recipe: Recipe, plan: Plan, *, bench: RunInputs, folder: RunFolder) -> Scores | None:
    """Pass 1, and the trials where the depth criterion makes some; not if the recipe names all that goes."""
    origin = _origin_of_scores(recipe, plan, bench=bench)
    if origin is None:
        return None

    def make(path: Path) -> Scores:
        if is_first():
            shutil.rmtree(folder.path / TRAIL, ignore_errors=True)  # of a run that was killed: written again
        made = _scored(
            recipe, plan, bench=bench, windows_NL=bench.windows, store=bench.store(folder.path), steps=folder.steps
        )
        if is_first():
            write_beside(path, made.save)
        return made

    return folder.produce("scores", origin, file="scores.safetensors", load=Scores.load, make=make, together=True)


def find_cut(
    recipe: Recipe,
    plan: Plan,
    *,
    bench: RunInputs,
    folder: RunFolder,
    scores: Scores | None,
    warnings: list[str],
) -> Cut:
    """The cut that the scores choose, or what a person made of it; then a warning says so."""
    chosen = choose_cut(bench.anatomy, scores, sizes=_planned_sizes(plan, recipe))

    def make(path: Path) -> Cut:
        chosen.save(path)
        return chosen

    origin = fingerprint(
        file_fingerprint(folder.path / "scores.safetensors"),
        chosen.widths,
        chosen.num_experts,
        chosen.kv_groups,
        chosen.layers,
    )
    cut = folder.produce("cut", origin, file="cut.json", load=Cut.load, make=make)
    cut.require_like(chosen)
    if cut.layers != chosen.layers:
        warnings.append(
            f"cut.json was edited: it removes layers {list(cut.removed)}, the scores chose {list(chosen.removed)}"
        )
    return cut


def check_calibration(recipe: Recipe, plan: Plan, *, bench: RunInputs, folder: RunFolder) -> StabilityFigures | None:
    """What each half of the calibration would choose; None where the recipe names all that goes.

    Trials of a depth criterion then run on as much of a half as they run on of the whole.
    """
    origin = _origin_of_scores(recipe, plan, bench=bench)
    if origin is None:
        return None

    depth = recipe.depth

    def choose(windows_NL: Tensor) -> Cut:
        on_half = recipe
        if depth and isinstance(depth.criterion, TrialCriterion):
            criterion = depth.criterion.scaled(len(windows_NL), len(bench.windows))
            on_half = recipe.model_copy(update={"depth": depth.model_copy(update={"criterion": criterion})})
        store = bench.store(folder.path, windows_NL)
        scores = _scored(on_half, plan, bench=bench, windows_NL=windows_NL, store=store, steps=[])
        if store.cache:
            store.cache.remove()  # pass 2 walks all windows
        return choose_cut(bench.anatomy, scores, sizes=_planned_sizes(plan, recipe))

    def make(path: Path) -> StabilityFigures:
        with account(folder.steps, "calibration check", tokens=bench.windows.numel()):
            named = plan.removed_layers is not None
            found = compare(choose, bench.windows, anatomy=bench.anatomy, named=named, sources_N=bench.sources)
        folder.write(path.name, found.model_dump_json(indent=1) + "\n")
        return found

    def load(path: Path) -> StabilityFigures:
        return StabilityFigures.model_validate_json(path.read_text(encoding="utf-8"))

    return folder.produce(
        "calibration check",
        fingerprint(origin, _planned_sizes(plan, recipe)),
        file="calibration-check.json",
        load=load,
        make=make,
        together=True,
    )


def require_halves(recipe: Recipe) -> None:
    """Raise CalibrationError where the calibration has no halves that every process has a window of."""
    (samples, _), processes = recipe.calibration.shape(), count()
    if samples // 2 < processes:
        raise CalibrationError(
            f"--calibration-check lets each half of the calibration choose, and {plural(samples, 'sample')} cannot be "
            f"split into halves of at least {processes}; raise calibration.samples, or leave the option out"
        )


def _scored(
    recipe: Recipe, plan: Plan, *, bench: RunInputs, windows_NL: Tensor, store: HiddenStateStore, steps: list[Step]
) -> Scores:
    """Scores by these windows, as the recipe says."""
    depth, width, heads, experts = _criteria(recipe)
    passing = depth if isinstance(depth, PassingCriterion) else None
    remove, batch_size = plan.dense.layers - plan.keep_layers, recipe.calibration.batch_size
    with account(steps, "pass 1", tokens=windows_NL.numel()):
        scores = score(
            bench.dense,
            bench.anatomy,
            windows_NL=windows_NL,
            batch_size=batch_size,
            depth=passing,
            width=width,
            experts=experts,
            store=store,
            remove=remove,
            heads=heads,
            keep_pattern=_keeps_pattern(recipe),
        )
    if not isinstance(depth, TrialCriterion):
        return scores
    with account(steps, "trials", tokens=windows_NL.numel()):
        layers_N = layer_ablation_scores(
            bench.dense,
            bench.anatomy,
            criterion=depth,
            windows_NL=windows_NL,
            batch_size=batch_size,
            remove=remove,
            store=store,
            keep_pattern=_keeps_pattern(recipe),
        )
    return replace(scores, layers=layers_N)


def _origin_of_scores(recipe: Recipe, plan: Plan, *, bench: RunInputs) -> str | None:
    """Fingerprint of all that the scores depend on; None where nothing is scored."""
    criteria = _criteria(recipe)
    if not any(criteria):
        return None
    horizon = criteria.depth.horizon(plan.dense.layers - plan.keep_layers) if criteria.depth else None
    return fingerprint(bench.identity, bench.windows_fingerprint, horizon, _keeps_pattern(recipe), *criteria)


def _keeps_pattern(recipe: Recipe) -> bool:
    return bool(recipe.depth and recipe.depth.keep_pattern)


class _Criteria(NamedTuple):
    """The criteria of what the scores decide."""

    depth: DepthCriterion | None
    width: WidthCriterion | None
    heads: WidthCriterion | None
    experts: ExpertCriterion | None


def _criteria(recipe: Recipe) -> _Criteria:
    width = recipe.width
    return _Criteria(
        recipe.depth.criterion if recipe.depth and recipe.depth.layers is None else None,
        width.neurons_by if width and width.cuts_mlp else None,
        width.heads_by if width and width.heads is not None else None,
        recipe.experts.criterion if recipe.experts else None,
    )


def _planned_sizes(plan: Plan, recipe: Recipe) -> PlannedSizes:
    return PlannedSizes(
        removed_layers=plan.removed_layers,
        keep_layers=plan.keep_layers,
        widths=plan.keep_widths,
        num_experts=plan.keep_experts,
        kv_groups=plan.keep_kv_groups,
        keep_pattern=_keeps_pattern(recipe),
    )
