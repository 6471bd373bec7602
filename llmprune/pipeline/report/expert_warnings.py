"""Warnings about experts that got few calibration tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.prune.records import LayerRecord
from llmprune.results.formatting import plural
from llmprune.score.scores import Scores


def warn_of_unrouted_experts(scores: Scores) -> list[str]:
    """Return a warning where no calibration token was routed to some experts."""
    unrouted = {key: int((tokens_E == 0).sum()) for key, tokens_E in scores.routed.items()}
    places = [key for key, experts in unrouted.items() if experts]
    if not places:
        return []
    named = ", ".join([*places[:3], *(["…"] if len(places) > 3 else [])])
    return [
        f"{plural(sum(unrouted.values()), 'expert')} in {plural(len(places), 'layer')} ({named}) got no calibration "
        "token: scored by the norm of their output weights; more calibration text would reach them"
    ]


def warn_of_experts_without_refit(records: Sequence[LayerRecord]) -> list[str]:
    """Return a warning where experts had too few calibration tokens to be refit."""
    few = {record.layer: record.experts.few_tokens for record in records if record.experts is not None}
    layers = [layer for layer, experts in few.items() if experts]
    if not layers:
        return []
    return [
        f"{plural(sum(few.values()), 'expert')} in {plural(len(layers), 'layer')} got too few calibration tokens to be "
        "refit, and keep their sliced weights; more calibration text would reach them"
    ]
