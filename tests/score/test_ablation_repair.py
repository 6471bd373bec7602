"""Ablation with repair: the layer before an ablated one is refit to absorb it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import ablation_scores
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.common.errors import CalibrationError
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.residual import Residual
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.layerwise.residual_scale import residual_scale
from llmprune.score.ablation import AblatedModels, evenly_spaced_subset
from llmprune.score.ablation_repair import AblationRepair
from llmprune.score.inputs import CalibrationBatches
from llmprune.score.layer_turns import Layers
from llmprune.testing import tiny_model


@pytest.mark.parametrize("family", ["gemma2", "mamba"])
def test_residual_says_where_no_layer_can_be_refit(family: str, windows: Tensor) -> None:
    """With a norm after the MLP, or without an MLP, it would be divergence under another name."""
    other = tiny_model(family, num_hidden_layers=3)
    with pytest.raises(CalibrationError, match=r"no layer of this model can be refit .* choose divergence"):
        ablation_scores(other, Residual(windows=2), windows, remove=1)


def test_refits_are_the_same_from_files(model: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    """Hidden states and inputs that they are solved on may be kept in files."""
    scores = [
        ablation_scores(model, Residual(windows=2), windows, remove=2, store=store)
        for store in (HiddenStateStore(), HiddenStateStore(0, tmp_path))
    ]
    assert torch.equal(*scores)


def test_refits_lower_the_divergence() -> None:
    """Where the output of the layer before predicts that of the layer, a refit makes the removal cheaper."""
    model = tiny_model("llama", num_hidden_layers=5, hidden_size=16, intermediate_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)
    windows_NL = torch.randint(0, 16, (40, 12), generator=torch.Generator().manual_seed(5))
    kinds: list[AblationCriterion] = [
        Divergence(windows=8, greedy=False, tokens=None),
        Residual(windows=8, refit_windows=32, ridge=0.1, greedy=False),
    ]
    without, repaired = (ablation_scores(model, kind, windows_NL, remove=1, batch_size=8) for kind in kinds)
    assert float(repaired[0]) == pytest.approx(float(without[0]), rel=1e-4)  # no layer is before the first one
    assert float(repaired[1:].sum()) < float(without[1:].sum())


def test_all_processes_refit_the_same_layers(model: PreTrainedModel, windows: Tensor) -> None:
    """A process that measures another scale uses that of the first one, and calls what the first one calls."""
    dense, anatomy, layers = dense_decoder(model), discover(model.config), range(model.config.num_hidden_layers)
    judged_NL, solved_NL = evenly_spaced_subset(windows, 2)

    def costs(measure: Any = residual_scale, agree: Any = lambda value: value) -> dict[Layers, float]:
        solved = CalibrationBatches(solved_NL, 2)
        repair = AblationRepair(dense, anatomy, calibration=solved, ridge=0.5, measure=measure, agree=agree)
        criterion, judged = Residual(windows=2), CalibrationBatches(judged_NL, 2)
        models = AblatedModels(dense, criterion, calibration=judged, repair=repair)
        return models.without_each(layers, [(layer,) for layer in layers])

    found: list[float | None] = []
    alone = costs(agree=lambda scale: (found.append(scale), scale)[1])
    first = iter(found)
    assert costs(measure=lambda *_, **__: None, agree=lambda _: next(first)) == alone


def test_residual_needs_windows_to_refit_on(model: PreTrainedModel, windows: Tensor) -> None:
    """Where the divergence is measured on all windows, the error says which setting to change."""
    with pytest.raises(CalibrationError, match=r"lower depth\.criterion\.windows"):
        ablation_scores(model, Residual(windows=6), windows, remove=1)
