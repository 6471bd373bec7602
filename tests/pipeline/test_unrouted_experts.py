"""Warning about experts that got no calibration token."""

from __future__ import annotations

import torch

from llmprune.pipeline.report.expert_warnings import warn_of_experts_without_refit, warn_of_unrouted_experts
from llmprune.prune.records import ExpertsRecord, LayerRecord
from llmprune.score.scores import Scores


def test_singular_and_plural() -> None:
    """One expert in one layer is singular; an ellipsis follows three of more layers."""
    few = Scores(None, {}, routed={"3.mlp": torch.tensor([1, 0])})
    assert warn_of_unrouted_experts(few)[0].startswith("1 expert in 1 layer (3.mlp) got no calibration token")
    many = Scores(None, {}, routed={f"{layer}.mlp": torch.tensor([0, 0]) for layer in range(4)})
    assert warn_of_unrouted_experts(many)[0].startswith("8 experts in 4 layers (0.mlp, 1.mlp, 2.mlp, …)")


def test_experts_that_were_not_refit() -> None:
    """Experts with too few tokens are counted over the layers that have some."""
    records = [LayerRecord(layer, 0.1, None, experts=ExpertsRecord(3, layer, -0.1)) for layer in range(3)]
    (warning,) = warn_of_experts_without_refit([*records, LayerRecord(3, None, None)])
    assert warning.startswith("3 experts in 2 layers got too few calibration tokens to be refit")
    assert warn_of_experts_without_refit(records[:1]) == []
