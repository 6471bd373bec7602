"""Scores by source: summed apart in one pass over mixed batches, and combined by ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import IDS, store_in
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import Anatomy
from llmprune.common.errors import CalibrationError
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.base import DepthCriterion, HiddenStateCriterion, WidthCriterion
from llmprune.criteria.combine import combine_scores
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.experts.reap import Reap
from llmprune.layerwise.decoder import Decoder
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.testing import tiny_model

SOURCES = torch.tensor([1, 0, 1, 1, 0, 1])
LLAMA, MIXTRAL = tiny_model("llama", num_hidden_layers=3), tiny_model("mixtral")
WIDTHS = [kind() for kind in WidthCriterion.kinds()]
DEPTHS = [kind() for kind in DepthCriterion.kinds() if issubclass(kind, HiddenStateCriterion)]


@cache
def decoder_of(model: Any) -> tuple[Decoder, Anatomy]:
    """Decoder and anatomy of a model."""
    return dense_decoder(model), discover(model.config)


def scores_of(
    criteria: ScoringCriteria, folder: Path, *, model: Any = LLAMA, windows: Tensor | None = None, batch_size: int = 4
) -> Scores:
    """Scores of a model by source, or by some windows alone."""
    told_apart = {} if windows is not None else {"sources_N": SOURCES, "combine": "rank_mean"}
    return score(
        *decoder_of(model),
        criteria=criteria,
        calibration=CalibrationBatches(IDS if windows is None else windows, batch_size, store_in(folder), **told_apart),
        target=DepthTarget(2),
    )


def tensors_of(scores: Scores) -> dict[str, Tensor]:
    """Every score by a name."""
    kinds = (scores.neurons, scores.heads, scores.experts, scores.routed)
    found = {f"{number} {key}": value for number, kind in enumerate(kinds) for key, value in kind.items()}
    return found if scores.layers is None else found | {"layers": scores.layers}


def require_each_alone(criteria: ScoringCriteria, folder: Path, model: Any = LLAMA) -> None:
    """Compare the scores by each source with those of a run on its windows alone, at several batch sizes."""
    alone = [scores_of(criteria, folder, model=model, windows=IDS[source == SOURCES]) for source in (0, 1)]
    for batch_size in (1, 4):
        found = scores_of(criteria, folder, model=model, batch_size=batch_size)
        for own, wanted in zip(found.by_source, alone, strict=True):
            torch.testing.assert_close(tensors_of(own), tensors_of(wanted), rtol=2e-3, atol=1e-6)
        for key, scores_F in found.neurons.items():
            ranked_F = combine_scores([own.neurons[key] for own in found.by_source], "rank_mean")
            assert torch.equal(scores_F, ranked_F)


@pytest.mark.parametrize("criterion", WIDTHS, ids=lambda criterion: criterion.kind)
def test_each_source_scores_neurons_and_heads_as_if_alone(criterion: WidthCriterion, tmp_path: Path) -> None:
    """For every criterion, whatever the batch size."""
    require_each_alone(ScoringCriteria(width=criterion, heads=criterion), tmp_path)


@pytest.mark.parametrize("criterion", DEPTHS, ids=lambda criterion: criterion.kind)
def test_each_source_scores_layers_as_if_alone(criterion: HiddenStateCriterion, tmp_path: Path) -> None:
    """For every criterion that reads hidden states."""
    require_each_alone(ScoringCriteria(depth=criterion), tmp_path)


def test_each_source_scores_experts_and_their_neurons_as_if_alone(tmp_path: Path) -> None:
    """The tokens of a routed expert are told apart."""
    width = next(criterion for criterion in WIDTHS if criterion.kind == "activation")
    require_each_alone(ScoringCriteria(width=width, experts=Reap()), tmp_path, model=MIXTRAL)


@pytest.mark.parametrize("kind", ["activation", "share", "taylor"])
def test_sums_by_source_add_up_to_pooled_ones(kind: str, tmp_path: Path) -> None:
    """Means over the tokens of all sources are the means of the sources, weighted by their windows."""
    criterion = next(criterion for criterion in WIDTHS if criterion.kind == kind)
    criteria = ScoringCriteria(width=criterion)
    pooled, by_source = scores_of(criteria, tmp_path, windows=IDS), scores_of(criteria, tmp_path).by_source
    for key, scores_F in pooled.neurons.items():
        total_F = (2 * by_source[0].neurons[key] + 4 * by_source[1].neurons[key]) / 6
        torch.testing.assert_close(scores_F, total_F, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("criterion", WIDTHS, ids=lambda criterion: criterion.kind)
def test_pooled_sources_have_the_same_weight(criterion: WidthCriterion, tmp_path: Path) -> None:
    """Two windows of one source count as much as four of the other: as if each of the two were there twice."""
    criteria = ScoringCriteria(depth=DEPTHS[0], width=criterion, heads=criterion)
    twice = torch.cat([IDS, IDS[SOURCES == 0]])
    wanted = scores_of(criteria, tmp_path, windows=twice)
    for batch_size in (1, 4):
        calibration = CalibrationBatches(IDS, batch_size, store_in(tmp_path / "pooled"), sources_N=1 - SOURCES)
        (tmp_path / "pooled").mkdir(exist_ok=True)
        found = score(*decoder_of(LLAMA), criteria=criteria, calibration=calibration, target=DepthTarget(2))
        assert not found.by_source
        torch.testing.assert_close(tensors_of(found), tensors_of(wanted), rtol=2e-3, atol=1e-6)


def test_pooled_sources_have_the_same_weight_in_experts(tmp_path: Path) -> None:
    """Scores of experts and of their neurons likewise; tokens are counted as they are."""
    width = next(criterion for criterion in WIDTHS if criterion.kind == "activation")
    criteria = ScoringCriteria(width=width, experts=Reap())
    wanted = scores_of(criteria, tmp_path, model=MIXTRAL, windows=torch.cat([IDS, IDS[SOURCES == 0]]))
    found = score(
        *decoder_of(MIXTRAL), criteria=criteria, calibration=CalibrationBatches(IDS, 4, sources_N=1 - SOURCES)
    )
    torch.testing.assert_close(found.neurons, wanted.neurons, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found.experts, wanted.experts, rtol=2e-3, atol=1e-6)
    assert all(float(tokens_E.sum()) == 2 * IDS.numel() for tokens_E in found.routed.values())


def test_one_source_is_not_ranked(tmp_path: Path) -> None:
    """Windows of a single source give the scores that they give without sources, to the bit."""
    criteria = ScoringCriteria(depth=DEPTHS[0], width=WIDTHS[0])
    plain = scores_of(criteria, tmp_path, windows=IDS)
    one = score(
        *decoder_of(LLAMA),
        criteria=criteria,
        calibration=CalibrationBatches(IDS, 4, sources_N=torch.zeros(6, dtype=torch.int64), combine="worst"),
        target=DepthTarget(2),
    )
    assert not one.by_source
    assert all(torch.equal(value, tensors_of(one)[name]) for name, value in tensors_of(plain).items())


def test_saved_scores_keep_the_sources_apart(tmp_path: Path) -> None:
    """Reading gives what was written."""
    found = scores_of(ScoringCriteria(depth=DEPTHS[0], width=WIDTHS[0], experts=Reap()), tmp_path, model=MIXTRAL)
    found.save(tmp_path / "scores.safetensors")
    read = Scores.load(tmp_path / "scores.safetensors")
    for one, other in zip((found, *found.by_source), (read, *read.by_source), strict=True):
        assert tensors_of(one).keys() == tensors_of(other).keys()
        assert all(torch.equal(value, tensors_of(other)[name]) for name, value in tensors_of(one).items())


@pytest.mark.parametrize("kind", ["divergence", "residual"])
def test_ablation_ranks_layers_by_each_source(kind: str) -> None:
    """One round's ranks are those of the costs on the source's own windows, whatever the batch size."""
    criterion = next(one for one in DepthCriterion.kinds() if one().kind == kind)(windows=4, greedy=False)
    assert isinstance(criterion, AblationCriterion)
    windows, sources_N = IDS.repeat(2, 1), SOURCES.repeat(2)
    found = []
    for batch_size in (1, 3):
        calibration = CalibrationBatches(windows, batch_size, sources_N=sources_N, combine="worst")
        found.append(
            layer_ablation_scores(
                *decoder_of(LLAMA), criterion=criterion, calibration=calibration, target=DepthTarget(1)
            )
        )
    assert torch.equal(found[0], found[1])
    assert found[0].min() >= 0
    assert found[0].max() <= len(decoder_of(LLAMA)[0])


def test_ablation_needs_a_window_of_every_source() -> None:
    """The error names the remedy."""
    criterion = Divergence(windows=1)
    calibration = CalibrationBatches(IDS, 2, sources_N=SOURCES, combine="worst")
    with pytest.raises(
        CalibrationError, match=r"1 of \d+ calibration windows, which have none of 1 of its 2 sources; raise depth"
    ):
        layer_ablation_scores(*decoder_of(LLAMA), criterion=criterion, calibration=calibration, target=DepthTarget(1))
