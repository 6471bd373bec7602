"""Outcome for the prediction heads of the base model (multi-token prediction)."""

from __future__ import annotations

from llmprune.results.figures.base import Figures


class PredictionHeads(Figures):
    """Outcome for the heads that predict further tokens. ``tensors``, ``bytes``: in the base's files."""

    fields: tuple[str, ...]  # of the base's config that declare them
    tensors: int
    bytes: int
    narrowed: bool  # units of their layers are removed with those of the decoder, the ones with the smallest weights
    reason: str | None  # why they are not kept; None where they are
