"""Stability of the cut: the selection is repeated on each half of the calibration windows, and compared."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from llmprune.common.distributed import world_size
from llmprune.common.errors import CalibrationError
from llmprune.cut.decision import Cut
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.score_and_select import compute_scores, origin_of_scores, scored_windows
from llmprune.pipeline.scored_sizes import planned_sizes
from llmprune.pipeline.step_costs import measure_step
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.stability import StabilityFigures
from llmprune.results.run_folder.fingerprints import fingerprint
from llmprune.score.select import choose_cut
from llmprune.score.stability import compare


def check_calibration(context: RunContext) -> StabilityFigures | None:
    """Compare the cuts that the two halves of the calibration windows select; None where nothing is scored."""
    origin = origin_of_scores(context)
    if origin is None:
        return None
    inputs, folder = context.inputs, context.folder

    def make() -> StabilityFigures:
        with measure_step(folder.steps, "calibration check", tokens=inputs.windows.numel()):
            named = context.plan.removed_layers is not None
            return compare(
                lambda numbers_N: _cut_selected_by(context, numbers_N),
                len(scored_windows(context).windows_NL),
                anatomy=inputs.anatomy,
                named=named,
            )

    return folder.produce_figures(
        "calibration check",
        fingerprint(origin, planned_sizes(context)),
        file="calibration-check.json",
        kind=StabilityFigures,
        make=make,
    )


def _cut_selected_by(context: RunContext, numbers_N: Tensor) -> Cut:
    """Score one half of the calibration windows, given by their numbers, and select a cut.

    A depth criterion that ablates layers uses the same share of a half as of all windows.
    """
    inputs, depth = context.inputs, context.recipe.depth
    on_half = context
    if depth:
        criterion = depth.criterion.scaled(len(numbers_N), len(scored_windows(context).windows_NL))
        depth = depth.model_copy(update={"criterion": criterion})
        on_half = replace(context, recipe=context.recipe.model_copy(update={"depth": depth}))
    scores = compute_scores(on_half, scored_windows(context).at(numbers_N), steps=[])
    return choose_cut(inputs.anatomy, scores, sizes=planned_sizes(context))


def require_halves(recipe: Recipe) -> None:
    """Raise CalibrationError unless every process gets a window of each half of the calibration windows."""
    (samples, _), processes = recipe.calibration.shape(), world_size()
    if samples // 2 < processes:
        raise CalibrationError(
            f"--calibration-check selects a cut on each half of the calibration windows, and {samples} of them cannot "
            f"be split into halves of at least {processes}; raise calibration.samples, or leave the option out"
        )
