"""Models that a pruned model was made from, where it was pruned several times."""

from __future__ import annotations

from llmprune.results.figures.base import Figures


class Ancestor(Figures):
    """A model that was pruned. ``commit``: on the hub; None for a folder or file."""

    name: str
    commit: str | None
    parameters: int
