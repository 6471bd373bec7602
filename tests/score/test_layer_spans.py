"""Spans of consecutive layers scored by the hidden states before and after them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.decoders import dense_decoder
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.criteria.depth.angular import Angular
from llmprune.cut.decision import choose_layers
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_angular_removes_the_span_that_rotates_least(tokens: str, model: PreTrainedModel, windows: Tensor) -> None:
    """The removed layers are the span over which the angle is smallest."""
    layers = model.config.num_hidden_layers
    hidden = model(input_ids=windows, output_hidden_states=True, use_cache=False).hidden_states
    chosen = slice(-1, None) if tokens == "last" else slice(None)

    def distance(start: int, end: int) -> float:
        if end == layers:  # the model returns its last hidden states after the final norm
            return math.inf
        cosine = nn.functional.cosine_similarity(hidden[start][:, chosen], hidden[end][:, chosen], dim=-1)
        return float((cosine.clamp(-1, 1).acos() / math.pi).mean())

    scores = score(
        dense_decoder(model),
        discover(model.config),
        criteria=ScoringCriteria(depth=Angular(tokens=tokens)),
        calibration=CalibrationBatches(windows, 4),
        target=DepthTarget(2),
    )
    assert scores.layers is not None
    found = [distance(start, start + 2) for start in range(layers - 1)]
    best = min(range(layers - 1), key=found.__getitem__)
    kept = choose_layers(scores.layers, layers - 2)
    removed = sorted(set(range(layers)) - set(kept))
    assert removed[1] == removed[0] + 1
    assert removed in ([best, best + 1], [layers - 2, layers - 1])
    assert float(scores.layers[removed[0]]) <= found[best] + 1e-6


def test_only_the_tokens_that_are_read_are_kept(model: PreTrainedModel, windows: Tensor) -> None:
    """A copy of the last tokens takes no more memory than these."""
    forward = LayerwiseForward(dense_decoder(model), windows, batch_size=2)
    copied = forward.copy(slice(-1, None))
    for part_BLD, whole_BLD in zip(copied, forward.hidden_states, strict=True):
        assert torch.equal(part_BLD, whole_BLD[:, -1:])
        assert part_BLD.untyped_storage().nbytes() == part_BLD.numel() * part_BLD.element_size()
