"""Shapes that are tried together: each is judged as if it were alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers.decoders import dense_decoder

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import Anatomy
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.repair.folds import Folds
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.search.judging import Judge
from llmprune.search.repaired import RepairWindows, repaired_divergence
from llmprune.search.side_by_side import divergences
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
SOURCES = torch.tensor([0, 1, 0, 1, 1, 0])
FAMILIES = ("llama", "qwen3", "gpt2", "mixtral")


@cache
def _model(family: str) -> tuple[Decoder, Anatomy, Scores]:
    """Decoder, anatomy and scores of a tiny model."""
    model = tiny_model(family)
    dense, anatomy = dense_decoder(model), discover(model.config)
    criteria = ScoringCriteria(
        width=Activation() if anatomy.widths else None,
        heads=Activation() if anatomy.heads and not anatomy.heads.refusal else None,
        experts=Reap() if anatomy.experts and not anatomy.experts.refusal else None,
    )
    return dense, anatomy, score(dense, anatomy, criteria=criteria, calibration=CalibrationBatches(IDS, 2))


def _cuts(family: str) -> list[Cut]:
    """Cuts of several shapes, two of them with the same units and different layers, and nothing cut."""
    _, anatomy, scores = _model(family)
    widths = {field: width // 2 for field, width in anatomy.widths.items()}
    whole = dict(anatomy.widths)
    layers = anatomy.num_layers
    sizes = [
        PlannedSizes((), layers, whole),
        PlannedSizes((1,), layers - 1, whole),
        PlannedSizes((0, 2), layers - 2, whole),
        PlannedSizes((1,), layers - 1, widths),
        PlannedSizes((1, 2), layers - 2, widths),
    ]
    if anatomy.heads and anatomy.heads.possible:
        sizes.append(PlannedSizes((2,), layers - 1, widths, None, anatomy.heads.possible[0]))
    if anatomy.experts and not anatomy.experts.refusal:
        sizes.append(PlannedSizes((), layers, whole, anatomy.experts.count - 1))
    return [choose_cut(anatomy, scores, sizes=one) for one in sizes]


def _judge(family: str) -> Judge:
    return Judge(_model(family)[0], CalibrationBatches(IDS, 2, sources_N=SOURCES))


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_tried_together_score_as_alone(family: str) -> None:
    """Shared hidden states change nothing: the divergences by source are bit-equal to those of each cut model."""
    dense, anatomy, _ = _model(family)
    judge, cuts = _judge(family), _cuts(family)
    found_SC = divergences(judge, anatomy, cuts=cuts)
    for number, cut in enumerate(cuts):
        own = cut_decoder(dense, anatomy=anatomy, cut=cut)
        forward = judge.forward(own)
        for index in range(len(own)):
            with own.layer(index) as layer:
                forward.pass_through(index, layer)
        assert torch.equal(found_SC[:, number], judge.divergences([forward.hidden_states])[:, 0]), cut
    assert torch.equal(found_SC[:, 0], torch.zeros(2, dtype=torch.float64))
    assert (found_SC[:, 1:] > 0).all()


def test_sources_are_judged_apart() -> None:
    """The divergence of a source is that of its windows alone."""
    anatomy = _model("llama")[1]
    cuts, judge = _cuts("llama"), _judge("llama")
    together_SC = divergences(judge, anatomy, cuts=cuts)
    for source in (0, 1):
        alone = judge.at((source == SOURCES).nonzero().squeeze(1))
        own_SC = divergences(Judge(alone.dense, CalibrationBatches(alone.batches.windows_NL, 2)), anatomy, cuts=cuts)
        assert torch.allclose(own_SC[0], together_SC[source], rtol=1e-6)


@pytest.mark.parametrize("cut", range(5))
def test_a_repaired_shape_is_judged_as_it_is_written(cut: int) -> None:
    """The windows that follow pass 2 end where the finished layers lead them, also where a layer is untouched."""
    dense, anatomy, _ = _model("llama")
    judge, chosen = _judge("llama"), _cuts("llama")[cut]
    solved = RepairWindows(IDS, Folds.of(IDS, None), 2, HiddenStateStore())
    found_S = repaired_divergence(judge, anatomy, cut=chosen, refit=Refit(), solved=solved)
    written: dict[int, dict[str, torch.Tensor]] = {}
    own = cut_decoder(dense, anatomy=anatomy, cut=chosen)
    Pruning(dense, own, anatomy=anatomy, cut=chosen, refit=Refit(), write=written.__setitem__).run(IDS, 2)
    forward = judge.forward(own)
    for index in range(len(own)):
        with own.layer(index, written[index]) as layer:
            forward.pass_through(index, layer)
    assert torch.allclose(found_S, judge.divergences([forward.hidden_states])[:, 0], rtol=1e-6, atol=1e-12)
