"""Repairs of a kept layer: the interface, the order, and the weights that they work on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from helpers.decoders import dense_decoder

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import PrunableDim
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.prune.layer_step import steps_of
from llmprune.prune.layer_weights import LayerWeights
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.pass2 import Pruning
from llmprune.prune.repair.base import LayerRepair, Stage
from llmprune.prune.repair.output_projection import OutputProjectionRefit
from llmprune.prune.repair.registry import REPAIRS
from llmprune.recipe.refit import Refit
from llmprune.testing import VOCABULARY, tiny_model

CUT = Cut(4, (0, 1, 3))
IDS = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


@dataclass
class ScaledOutput:
    """A repair that scales the layer's output projection, and records the layers that it was called for."""

    factor: float
    stage: Stage
    layers: list[int] = field(default_factory=list)
    refit: list[bool] = field(default_factory=list)

    def apply(self, run: Pass2Context, work: LayerWork) -> None:
        """Multiply the weight of ``mlp.down_proj``."""
        self.layers.append(work.step.old)
        self.refit.append(work.outcome.output is not None)
        work.weights.cut["mlp.down_proj.weight"] = work.weights.cut["mlp.down_proj.weight"] * self.factor


def _run(repairs: tuple[LayerRepair, ...], refit: Refit | None) -> dict[int, Tensors]:
    model = tiny_model("llama")
    anatomy, dense = discover(model.config), dense_decoder(model)
    written: dict[int, Tensors] = {}
    pruned = cut_decoder(dense, anatomy=anatomy, cut=CUT)
    write = written.__setitem__
    Pruning(dense, pruned, anatomy=anatomy, cut=CUT, refit=refit, write=write, repairs=repairs).run(IDS, 2)
    return written


def test_another_repair_is_a_class_and_a_line() -> None:
    """One more in the list is made in every touched layer after the others, and its weights are written."""
    last = ScaledOutput(2.0, Stage.AFTER_GAP)
    plain, scaled = _run(REPAIRS, Refit()), _run((*REPAIRS, last), Refit())
    assert last.layers == [1, 3]
    assert last.refit == [True, True]
    assert torch.equal(scaled[0]["mlp.down_proj.weight"], plain[0]["mlp.down_proj.weight"])
    assert torch.equal(scaled[1]["mlp.down_proj.weight"], 2 * plain[1]["mlp.down_proj.weight"])


def test_repairs_before_the_gap_precede_those_after_it() -> None:
    """The stage decides first, the order of the list second."""
    early = ScaledOutput(1.0, Stage.BEFORE_GAP)
    _run((OutputProjectionRefit(), early), Refit())
    assert early.refit == [False, False]


def test_without_a_refit_no_repair_is_made() -> None:
    """``refit: false`` leaves the list alone."""
    never = ScaledOutput(2.0, Stage.AFTER_GAP)
    _run((*REPAIRS, never), None)
    assert never.layers == []


def test_weights_under_work_belong_to_no_decoder() -> None:
    """A repair survives other visits of either decoder, and the dense model does not see it."""
    model = tiny_model("llama")
    anatomy, dense = discover(model.config), dense_decoder(model)
    pruned = cut_decoder(dense, anatomy=anatomy, cut=CUT)
    step = steps_of(CUT, anatomy, refit=Refit(), sparsity=None)[1]
    weights = LayerWeights.cut_out(step, dense, pruned=pruned)
    before = dense.tensors(1)["mlp.down_proj.weight"].clone()
    delta_DF = torch.ones_like(before)
    weights.add_to_projection(PrunableDim("mlp.down_proj.weight", 1), delta_DF)
    dense.tensors(0)
    pruned.tensors(2)
    assert torch.equal(weights.cut["mlp.down_proj.weight"], before + delta_DF)
    assert torch.equal(dense.tensors(1)["mlp.down_proj.weight"], before)
    assert torch.equal(pruned.tensors(1)["mlp.down_proj.weight"], before)


def test_a_decoder_hands_out_a_dict_of_the_callers_own() -> None:
    """What a caller puts into it is not in the next."""
    dense = dense_decoder(tiny_model("llama"))
    dense.tensors(0).clear()
    assert dense.tensors(0)
