"""Prediction heads of the base model (multi-token prediction): figures, and the sentence on what became of them."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.common.schema import format_size
from llmprune.results.figures import Figures
from llmprune.results.formatting import plural


class PredictionHeads(Figures):
    """Outcome for the heads that predict further tokens. ``tensors``, ``bytes``: in the base's files."""

    fields: tuple[str, ...]  # of the base's config that declare them
    tensors: int
    bytes: int
    narrowed: bool  # units of their layers are removed with those of the decoder, the ones with the smallest weights
    reason: str | None  # why they are not kept; None where they are


def describe_prediction_heads(found: PredictionHeads) -> str:
    """Return a sentence on the decision: heads kept, narrowed or left out."""
    heads = describe_declared(found.fields)
    if found.reason is not None:
        return f"{heads} are not part of the result: {found.reason}; the result's config declares none"
    cut = (
        "their layers keep the neurons, heads and experts with the largest weights"
        if found.narrowed
        else "they are copied unchanged"
    )
    return (
        f"{heads} are kept: {plural(found.tensors, 'tensor')}, {format_size(found.bytes)} in the base's files; {cut}, "
        "neither repaired, made sparse nor trained, and how many of their tokens the pruned model accepts was not "
        "measured"
    )


def describe_declared(fields: Sequence[str]) -> str:
    """Return the heads, with the fields of the config that declare them."""
    declared = f" ({', '.join(fields)} in its config)" if fields else ""
    return f"the base's heads that predict further tokens{declared}"
