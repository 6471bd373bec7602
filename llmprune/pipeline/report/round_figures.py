"""Rows of a report for the rounds of cut and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.pipeline.context import EarlierRounds
from llmprune.pipeline.report.composed_layers import compose_layers, compose_sources, layers_left
from llmprune.results.figures.layers import LayerFigures
from llmprune.results.figures.model_size import Size
from llmprune.results.figures.recovery import RecoveryFigures
from llmprune.results.figures.rounds import RoundFigures
from llmprune.results.figures.stability import SourceFigures
from llmprune.results.report_schema import Report


@dataclass(frozen=True)
class Round:
    """Layers of the model that a round cut, the size of its result, and its training."""

    layers: tuple[LayerFigures, ...]
    size: Size
    recovery: RecoveryFigures | None


def round_figures(earlier: Sequence[Report], last: Round) -> tuple[RoundFigures, ...]:
    """Return a row for each round, from the reports of those before the last."""
    rounds = [*(Round(report.layers, report.pruned, report.recovery) for report in earlier), last]
    rows, left = [], [row.layer for row in rounds[0].layers]
    for number, one in enumerate(rounds, start=1):
        assert one.recovery is not None, "every round trains"
        after = layers_left(compose_layers([before.layers for before in rounds[:number]]))
        rows.append(
            RoundFigures(
                size=one.size,
                removed_layers=tuple(layer for layer in left if layer not in after),
                tokens=one.recovery.tokens,
                before=one.recovery.before.mean_divergence,
                after=one.recovery.saved.mean_divergence,
                seconds=one.recovery.seconds,
            )
        )
        left = after
    return tuple(rows)


def about_rounds(earlier: EarlierRounds | None) -> list[str]:
    """Return a note on the model whose layers ``cut.json`` counts, where there are several rounds."""
    if earlier is None:
        return []
    number = len(earlier.reports)
    return [
        f"cut.json is the cut of the last of {number + 1} rounds, relative to the model of round {number}; the layers "
        "in this report are those of the first dense model, with the figures of the last round that saw them"
    ]


def source_figures(earlier: Sequence[Report], found: SourceFigures | None) -> SourceFigures | None:
    """Return the comparison of the sources by the layers of the first dense model."""
    if found is None or not earlier:
        return found
    before = compose_layers([report.layers for report in earlier])
    return compose_sources(found, layers_left(before), layers=len(before))
