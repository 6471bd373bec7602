"""Agreement of the sources of the calibration text: the selection by each of them alone, compared with the cut."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.cut.decision import Cut
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.score_and_select import (
    compute_pass1,
    is_scored_in_pass1,
    origin_of_scores,
    windows_by_source,
)
from llmprune.pipeline.scored_sizes import planned_sizes
from llmprune.pipeline.step_costs import measure_step
from llmprune.results.figures.stability import SourceFigures
from llmprune.results.run_folder.fingerprints import fingerprint
from llmprune.score.scores import Scores
from llmprune.score.select import choose_cut
from llmprune.score.source_agreement import compare_sources


def compares_sources(context: RunContext) -> bool:
    """Check whether pass 1 scores something by each of several sources, or can do so because several are read."""
    calibration = context.recipe.calibration
    return max(calibration.read_sources, calibration.scored_sources) > 1 and is_scored_in_pass1(context)


def check_sources(context: RunContext, scores: Scores | None, *, cut: Cut, asked: bool) -> SourceFigures | None:
    """Compare the cuts that sources would choose alone with the cut; None where scores are not summed by source.

    ``asked``: then they are summed by source in one more pass.
    """
    if scores is None or not compares_sources(context):
        return None
    if scores.by_source:
        return _figures(context, scores, cut=cut, by_source=scores.by_source)
    return _compute(context, scores, cut=cut) if asked else None


def _compute(context: RunContext, scores: Scores, *, cut: Cut) -> SourceFigures:
    """Score by source, and compare."""
    inputs, folder = context.inputs, context.folder

    def make() -> SourceFigures:
        with measure_step(folder.steps, "calibration check", tokens=inputs.windows.numel()):
            by_source = compute_pass1(context, windows_by_source(context), steps=[]).by_source  # the rest is not read
        return _figures(context, scores, cut=cut, by_source=by_source)

    assert inputs.sources is not None
    return folder.produce_figures(
        "calibration check",
        fingerprint(origin_of_scores(context), planned_sizes(context), inputs.sources.tolist(), cut.layers),
        file="source-check.json",
        kind=SourceFigures,
        make=make,
    )


def _figures(context: RunContext, scores: Scores, *, cut: Cut, by_source: Sequence[Scores]) -> SourceFigures:
    inputs, sizes = context.inputs, planned_sizes(context)
    assert inputs.sources is not None
    found = compare_sources(
        by_source, cut, choose=lambda one: choose_cut(inputs.anatomy, one, sizes=sizes), layers_N=scores.layers
    )
    names = inputs.texts.source_names
    windows = tuple(inputs.sources.bincount(minlength=len(names)).tolist())
    removed = () if sizes.removed_layers is not None else found.removed_layers
    return found.model_copy(update={"names": names, "windows": windows, "removed_layers": removed})
