"""Options of a run that no recipe has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmprune.pipeline.context import AmongRounds, Search
from llmprune.results.figures.search import SearchFigures


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that no recipe has.

    ``fresh`` makes every product anew. ``measure_forward`` times plain forward passes of the dense model over the
    calibration tokens, for comparison. ``calibration_check`` repeats the selection on each source of the
    calibration text, or on each half of a single one, and reports how far the cuts agree. ``end_recovery`` takes
    the best weights of a training that was stopped, and trains no more in its round. ``generated``: files of
    windows that a published run's dense model wrote, by their names in its repository, for a run that repeats it;
    ``searched``: figures of that run's search, whose shape is taken. ``scores_of``: run folder whose scores a new
    run folder begins with. ``among``: of a run that is one of several rounds; ``search``: of a run that is one of a
    family.
    """

    fresh: bool = False
    measure_forward: bool = False
    calibration_check: bool = False
    end_recovery: bool = False
    generated: Mapping[str, Path] = field(default_factory=dict)
    searched: SearchFigures | None = None
    scores_of: Path | None = None
    among: AmongRounds | None = None
    search: Search | None = None
