"""Sentence on the outcome for the prediction heads of the base model."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.common.schema import format_size
from llmprune.results.figures.prediction_heads import PredictionHeads
from llmprune.results.formatting import plural


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
