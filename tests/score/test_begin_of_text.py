"""Scores of text with begin-of-text tokens: they are no targets of a loss, and what writes their sink is kept.

Windows that end with the token have the losses of the same windows without it: no other token attends to the last one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import store_in
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.base import WidthCriterion
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.criteria.width.taylor import Taylor
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.testing import VOCABULARY, tiny_model

BEGIN = 1
WITHOUT = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
WITH = torch.cat([WITHOUT, torch.full((4, 1), BEGIN)], dim=1)
KINDS = {kind.model_fields["kind"].default: kind for kind in WidthCriterion.kinds() if not kind().needs_gradients}
CLOSE = {"rtol": 1e-3, "atol": 1e-6}


def _batches(windows_NL: Tensor, folder: Path) -> CalibrationBatches:
    place = folder / str(windows_NL.shape[1])
    place.mkdir()
    return CalibrationBatches(windows_NL, 2, store_in(place), (BEGIN,))


@pytest.mark.parametrize("criterion", [Perplexity(), Divergence(tokens=None)], ids=lambda criterion: criterion.kind)
def test_ablation_does_not_judge_the_prediction_of_the_token(criterion: AblationCriterion, tmp_path: Path) -> None:
    """Scores of layers are those of the text alone."""
    model = tiny_model("llama")
    with_token, without = (
        layer_ablation_scores(
            dense_decoder(model),
            discover(model.config),
            criterion=criterion,
            calibration=_batches(windows_NL, tmp_path),
            target=DepthTarget(1),
        )
        for windows_NL in (WITH, WITHOUT)
    )
    torch.testing.assert_close(with_token, without, **CLOSE)


def test_the_loss_of_gradients_leaves_the_token_out(tmp_path: Path) -> None:
    """Scores of neurons are those of the text alone, but for a mean over one position more."""
    model = tiny_model("llama")
    with_token, without = (
        score(
            dense_decoder(model),
            discover(model.config),
            criteria=ScoringCriteria(width=Taylor()),
            calibration=_batches(windows_NL, tmp_path),
        ).neurons
        for windows_NL in (WITH, WITHOUT)
    )
    for key, scores_F in without.items():
        torch.testing.assert_close(with_token[key] * WITH.shape[1] / WITHOUT.shape[1], scores_F, **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "magnitude"])
def test_the_neuron_that_writes_the_sink_is_kept(kind: str) -> None:
    """A neuron that is active at the first position of a window alone, and writes a sink there, scores high.

    It is inactive at the other 1,023 positions; without it attention has no sink.
    """
    generator = torch.Generator().manual_seed(0)
    values_BLF = torch.randn(1, 1024, 512, generator=generator)
    values_BLF[..., 0] = 0.0
    values_BLF[:, 0] = 0.1
    values_BLF[:, 0, 0] = 1000.0
    accumulator = KINDS[kind]().make_accumulator(torch.randn(64, 512, generator=generator), [])
    accumulator.update(values_BLF)
    scores_F = accumulator.scores()
    assert int((scores_F > scores_F[0]).sum()) < len(scores_F) // 4
