"""Width criteria on the layers of models, and their costs in a plan.

Shapes: D hidden size, F neurons, E experts.

"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import IDS, recipe_of, scores_of
from helpers.tiny import structure_of
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hooks import inputs_of
from llmprune.anatomy.selection import neuron_rows
from llmprune.anatomy.types import PrunableDim, unit_key
from llmprune.common.errors import RecipeError
from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.base import WidthCriterion
from llmprune.criteria.width.magnitude import Magnitude
from llmprune.criteria.width.obs import Obs
from llmprune.criteria.width.share import Share
from llmprune.layerwise.decoder import Decoder
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.testing import tiny_model

KINDS = {kind.model_fields["kind"].default: kind for kind in WidthCriterion.kinds()}


def test_a_bias_of_the_output_projection_is_no_share(tmp_path: Path) -> None:
    """A neuron's output is compared with the outputs of all neurons, without the bias of the module."""
    model = tiny_model("gpt2")
    mlp = model.transformer.h[0].mlp
    seen: list[Tensor] = []
    with inputs_of(mlp.c_proj, seen.append), torch.no_grad():
        model(IDS)
    mlp.c_proj.bias.data.fill_(100)
    accumulator = Share().make_accumulator(mlp.c_proj.weight.T)
    accumulator.update(seen[0])
    torch.testing.assert_close(scores_of(model, Share(), tmp_path)["0.mlp"], accumulator.scores(), rtol=1e-3, atol=0)


def test_accumulators_are_freed_with_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulators of one layer, which may hold its weights, are freed before the next layer is loaded."""
    model = tiny_model("llama")
    made: list[weakref.ref[UnitAccumulator]] = []
    left: list[int] = []
    make = Share.make_accumulator

    def watched(self: Share, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        accumulator = make(self, output_DF, inputs)
        made.append(weakref.ref(accumulator))
        return accumulator

    monkeypatch.setattr(Share, "make_accumulator", watched)
    dense = dense_decoder(model)

    def fetch(index: int) -> dict[str, Tensor]:
        left.append(sum(accumulator() is not None for accumulator in made))
        return dict(dense.tensors(index))

    decoder = Decoder(dense.skeleton, fetch, placement=dense.placement)
    score(
        decoder, discover(model.config), criteria=ScoringCriteria(width=Share()), calibration=CalibrationBatches(IDS, 2)
    )
    assert len(made) == 4
    assert not any(left)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [((1, 1), [[0, 2], [1, 3]]), ((2,), [[0, 1], [2, 3]]), ((1,), [[0], [1], [2], [3]])],
    ids=["chunked", "interleaved", "plain"],
)
def test_rows_of_a_fused_tensor_hold_gate_and_up(parts: tuple[int, ...], wanted: list[Any]) -> None:
    """A row holds all weights of one neuron, whatever the dimension and layout of the tensor."""
    tensor = torch.arange(4)
    assert neuron_rows(tensor, PrunableDim("bias", 0, parts)).tolist() == wanted
    sideways = neuron_rows(tensor.expand(3, 4), PrunableDim("weight", 1, parts))
    assert sideways[..., 0].tolist() == wanted
    assert sideways.shape[-1] == 3


@pytest.mark.parametrize("kind", ["flap", "magnitude", "share", "wanda"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_scored_as_if_each_were_a_unit(tmp_path: Path, kind: str, family: str) -> None:
    """Every stacked expert gets scores [E, F] by criteria that need neither a refit nor gradients."""
    for scores_EF in scores_of(tiny_model(family), KINDS[kind](), tmp_path).values():
        assert scores_EF.ndim == 2
        assert scores_EF.unique(dim=0).shape == scores_EF.shape
        assert scores_EF.min() > 0


def test_magnitude_of_stacked_experts_is_that_of_their_tensors(tmp_path: Path) -> None:
    """The norm covers the fused gate and up projections and the down projection of each expert."""
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
    wanted_EF = torch.cat([gate_EFD, up_EFD, experts.down_proj.transpose(1, 2)], dim=2).norm(dim=2)
    torch.testing.assert_close(scores_of(model, Magnitude(), tmp_path)[unit_key(1, "mlp.experts")], wanted_EF)


@pytest.mark.parametrize(
    ("kind", "reason"), [("obs", "experts are not refit"), ("taylor", "gradients are not computed")]
)
def test_routed_experts_are_refused_where_a_criterion_cannot_score_them(tmp_path: Path, kind: str, reason: str) -> None:
    """The plan names the reason and the remedy; units that every token passes through are still scored."""
    model = tiny_model("qwen2_moe")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=rf"{kind} cannot score.*moe_intermediate_size.*{reason}.*width\.neurons"):
        structure_of(recipe_of(tmp_path, {"mlp": 0.5, "criterion": {"kind": kind}}))
    named = {"neurons": {"shared_expert_intermediate_size": 32}, "criterion": {"kind": kind}}
    assert any(f"width.criterion {kind}" in note for note in structure_of(recipe_of(tmp_path, named)).notes)
    assert {key.partition(".")[2] for key in scores_of(model, KINDS[kind](), tmp_path)} == {"mlp.shared_expert"}


def test_the_plan_counts_the_memory_of_a_solve(tmp_path: Path) -> None:
    """Float64 matrices of the dense width take more memory than the refit of the kept neurons."""
    tiny_model("llama").config.save_pretrained(tmp_path)
    memory = [
        structure_of(recipe_of(tmp_path, {"neurons": 32, "criterion": {"kind": kind}})).memory.statistics
        for kind in ("activation", "obs")
    ]
    assert memory[0] < memory[1] == Obs().memory(96)
    sources = Obs().memory(96, 4) - Obs().memory(96)
    assert sources == 3 * 96**2 * 4  # one more float32 sum for each further source


def test_the_plan_counts_what_a_refit_keeps_of_all_windows(tmp_path: Path) -> None:
    """A refit keeps outputs of the dense token mixer and of the dense MLP, and what the kept neurons write."""
    tiny_model("gemma2").config.save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, {"neurons": 32})
    kept = [
        structure_of(recipe.model_copy(update={"refit": refit})).memory.hidden_states
        for refit in (None, Refit(up=False))
    ]
    assert kept[1] - kept[0] == 2 * 24 * (2 * 32 + 32) * 4  # windows, tokens, two hidden sizes and neurons, bytes


def test_the_plan_says_what_a_criterion_costs_and_misses(tmp_path: Path) -> None:
    """A slow criterion has a note, and so has one whose scores assume a refit that is off."""
    tiny_model("llama").config.save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, {"mlp": 0.5, "criterion": {"kind": "obs"}})
    notes = structure_of(recipe.model_copy(update={"refit": None})).notes
    assert [note.split(": ")[0] for note in notes if "criterion" in note] == [
        "width.criterion obs solves a system for every neuron of a layer; its time grows with the cube of the width",
        "width.criterion obs assumes the refit, which is off",
    ]
    assert not any("criterion" in note for note in structure_of(recipe_of(tmp_path, {"mlp": 0.5})).notes)
