"""Sources of the calibration text, with their share of the windows, for plan, report and model card."""

from __future__ import annotations

from llmprune.recipe.text_source import TextSource
from llmprune.results.figures.base import Figures


class CalibrationSource(Figures):
    """Source of some calibration windows. Fields are None where they are unknown or do not apply."""

    name: str
    text: str | None = None  # hub id, file or package; None for text that the dense model wrote itself
    config: str | None = None  # configuration of a hub data set
    split: str | None = None
    commit: str | None = None  # of a hub data set
    licence: str | None = None  # as the recipe or its mix states it
    windows: int
    tokens: int
    documents: int | None = None  # that the windows hold, whole or in part; None in a plan

    def with_origin(self, source: TextSource, *, commit: str | None) -> CalibrationSource:
        """Return the source with the place of its text. ``commit``: of a hub data set."""
        origin = {"text": source.dataset, "config": source.config, "split": source.split, "licence": source.licence}
        return self.model_copy(update=origin | {"commit": commit})
