"""Targets of projections that a norm follows.

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection.
"""

from __future__ import annotations

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import IDS

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import unit_key
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.repair.following_norm import FollowingNorm, FollowingNorms
from llmprune.prune.repair.residual_scales import ResidualScales
from llmprune.recipe.refit import Refit
from llmprune.testing import tiny_model

MLP = "mlp.down_proj"


def norm_of(family: str) -> FollowingNorm | None:
    """The norm after the MLP of a family's first layer."""
    forward = LayerwiseForward(dense_decoder(tiny_model(family)), IDS, batch_size=4)
    with forward.decoder.layer(0) as layer:
        return FollowingNorms(ResidualScales({})).of(forward, 0, layer=layer, output=MLP)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma3_text", "post_feedforward_layernorm"),
        ("glm4", "post_mlp_layernorm"),
        ("olmo2", "post_feedforward_layernorm"),
    ],
)
def test_the_norm_is_found_and_its_output_known(family: str, name: str) -> None:
    """What the projection adds to the hidden states follows from its output; other families have no such norm."""
    torch.manual_seed(0)
    model = tiny_model(family)
    for place, weight in model.named_parameters():
        if "norm" in place:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    forward = LayerwiseForward(dense_decoder(model), IDS, batch_size=4)
    with forward.decoder.layer(0) as layer:
        norm = FollowingNorms(ResidualScales({})).of(forward, 0, layer=layer, output=MLP)
        assert norm is not None
        output_BLD = torch.randn(2, 3, model.config.hidden_size)
        wanted_BLD = layer.get_submodule(name)(output_BLD)
    torch.testing.assert_close(norm.contribution(output_BLD), wanted_BLD, rtol=1e-4, atol=1e-4)
    assert norm.scale == 1
    assert norm_of("llama") is None


def test_an_error_that_the_projection_can_repair_is_repaired() -> None:
    """Where another weight writes what the stream lacks, the regression finds what that weight writes."""
    norm = norm_of("gemma3_text")
    assert norm is not None
    random = torch.Generator().manual_seed(0)
    hidden, inputs = len(norm.weight_D), 8
    input_BLF = torch.randn(4, 40, inputs, generator=random)
    weight_DF, other_DF = (torch.randn(hidden, inputs, generator=random) for _ in range(2))
    other_DF = weight_DF + 0.01 * other_DF
    contribution_BLD = norm.contribution(input_BLF @ weight_DF.T)
    missing_BLD = norm.contribution(input_BLF @ other_DF.T) - contribution_BLD
    wanted_BLD = norm.wanted(contribution_BLD, missing_BLD)
    torch.testing.assert_close(wanted_BLD, missing_BLD, rtol=1e-3, atol=1e-4)
    input_TF = (input_BLF * norm.token_factor(input_BLF @ weight_DF.T)).flatten(0, 1)
    solved_FD = torch.linalg.lstsq(input_TF, wanted_BLD.flatten(0, 1)).solution
    repaired_DF = weight_DF + norm.for_projection(solved_FD.T)
    left_BLD = norm.contribution(input_BLF @ repaired_DF.T) - contribution_BLD - missing_BLD
    assert left_BLD.norm() < 0.1 * missing_BLD.norm()


def test_the_wanted_contribution_is_the_nearest_that_the_norm_can_give() -> None:
    """Also where the norm's weights differ by factors of hundreds: no contribution of that length is nearer."""
    random = torch.Generator().manual_seed(0)
    norm = FollowingNorm(torch.logspace(-2, 1, 64), 1.0)
    contribution_BLD = norm.contribution(torch.randn(2, 3, 64, generator=random))
    missing_BLD = 2 * torch.randn(2, 3, 64, generator=random)
    target_BLD = contribution_BLD + missing_BLD
    found_BLD = contribution_BLD + norm.wanted(contribution_BLD, missing_BLD)
    error_BL = (found_BLD - target_BLD).norm(dim=-1)
    direction_BLD = found_BLD / norm.weight_D
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            moved_BLD = direction_BLD + size * torch.randn(2, 3, 64, generator=random)
            other_BLD = norm.contribution(moved_BLD)
            assert ((other_BLD - target_BLD).norm(dim=-1) >= error_BL * (1 - 1e-4)).all()
    assert (error_BL < missing_BLD.norm(dim=-1)).all()


def test_a_missing_contribution_is_as_long_as_the_norm_makes_it() -> None:
    """However much the stream lacks, the wanted contribution has the length that every one has."""
    norm = norm_of("gemma3_text")
    assert norm is not None
    output_BLD = torch.randn(2, 3, len(norm.weight_D), generator=torch.Generator().manual_seed(0))
    contribution_BLD = norm.contribution(output_BLD)
    wanted_BLD = contribution_BLD + norm.wanted(contribution_BLD, 100 * torch.randn_like(output_BLD))
    lengths_BL = [(value / norm.weight_D).norm(dim=-1) for value in (contribution_BLD, wanted_BLD)]
    torch.testing.assert_close(*lengths_BL, rtol=1e-4, atol=1e-4)
    assert norm.wanted(contribution_BLD, torch.zeros_like(output_BLD)).abs().max() < 1e-4


def narrowed(layers: tuple[int, ...]) -> list[LayerRecord]:
    """Records of a tiny Gemma 3 that keeps these layers, and half of the neurons of each."""
    model = tiny_model("gemma3_text")
    anatomy, dense = discover(model.config), dense_decoder(model)
    units = {index: anatomy.units[index][0] for index in layers}
    neurons = {unit_key(index, unit.path): torch.arange(unit.width // 2) for index, unit in units.items()}
    unit = units[layers[0]]
    cut = Cut(anatomy.num_layers, layers, widths={unit.field: unit.width // 2}, neurons=neurons)
    pruned, written = cut_decoder(dense, anatomy=anatomy, cut=cut), {}
    pruning = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(), write=written.__setitem__)
    return pruning.run(IDS, 4)[0]


def test_errors_of_earlier_layers_are_made_up_for_beside_removed_layers_alone() -> None:
    """In front of them, and where none is removed, a refit leads an MLP to what it added before its own cut."""
    assert [record.inherited for record in narrowed((0, 1, 2, 3))] == [0.0] * 4
    first, *others = narrowed((0, 1, 3))
    assert first.inherited == 0.0
    assert any(record.inherited for record in others)
