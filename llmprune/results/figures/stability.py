"""Agreement of the cuts that parts of the calibration text would choose: its halves, or its sources."""

from __future__ import annotations

from llmprune.results.figures.base import Figures


class Overlap(Figures):
    """Share of one calibration half's removals that the other half removes too."""

    mean: float  # over the layers
    least: float  # minimum over the layers
    by_chance: float  # expected for random choices


class StabilityFigures(Figures):
    """Agreement of the cuts chosen on two halves of the calibration text. None where nothing was chosen."""

    windows: tuple[int, int]
    removed_layers: tuple[tuple[int, ...], tuple[int, ...]]
    layers: Overlap | None
    neurons: Overlap | None
    heads: Overlap | None  # key-value groups
    experts: Overlap | None


class SourceFigures(Figures):
    """Cuts that the sources of the calibration text would choose, each alone.

    ``neurons``, ``heads`` and ``experts``: by layer of the dense model, the share of the kept ones that every source
    would keep; None for a layer that lost none. Empty where the run cuts none.
    """

    names: tuple[str, ...]
    windows: tuple[int, ...]  # of each source
    removed_layers: tuple[tuple[int, ...], ...]  # by each source; empty where layers have no scores by source
    neurons: tuple[float | None, ...]
    heads: tuple[float | None, ...]  # key-value groups
    experts: tuple[float | None, ...]
