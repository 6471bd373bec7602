"""Merging of removed experts into kept ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.decoders import dense_decoder
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.expert_hooks import outputs_of_experts
from llmprune.anatomy.selection import select_neurons
from llmprune.criteria.experts.reap import Reap
from llmprune.cut.apply import cut_layer
from llmprune.cut.decision import Cut
from llmprune.cut.merging import nearest_kept
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_expert_merged_with_itself_in_another_order_of_neurons_stays_the_same(family: str) -> None:
    """Neurons are matched before they are averaged, in every layout of the stacks, with their biases."""
    model = tiny_model(family)
    anatomy = discover(model.config)
    block, unit = anatomy.blocks[0], anatomy.units[0][0]
    assert block is not None
    tensors = dict(model.model.layers[0].state_dict())
    order_F = torch.randperm(unit.width, generator=torch.Generator().manual_seed(1))
    aligned = {one.name: replace(one, dim=one.dim - 1) for one in unit.tensors}
    for one in block.tensors:  # expert 3 becomes expert 1 with its neurons in another order, and its row of the router
        own = tensors[one.name][1]
        tensors[one.name][3] = select_neurons(own, aligned[one.name], keep=order_F) if one.name in aligned else own
    keep, merged_E = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 1])
    cut = Cut(4, (0, 1, 2, 3), {}, {}, 3, {"0.mlp.experts": keep})
    dropped = cut_layer(tensors, anatomy, cut=cut, layer=0)
    usage = torch.tensor([1.0, 3.0, 1.0, 2.0])
    cut = replace(cut, merged={"0.mlp.experts": merged_E}, usage={"0.mlp.experts": usage})
    merged = cut_layer(tensors, anatomy, cut=cut, layer=0)
    assert merged.keys() == dropped.keys()
    for name, tensor in dropped.items():
        torch.testing.assert_close(merged[name], tensor)


def test_experts_are_merged_into_the_nearest_of_their_group() -> None:
    """Kept experts stay; others go to the nearest kept one in their group, though another group has a nearer one."""
    distance_EE = torch.tensor([[0.0, 3, 2, 1], [3, 0, 4, 4], [2, 4, 0, 5], [1, 4, 5, 0]])
    assert nearest_kept(distance_EE, torch.tensor([1, 3])).tolist() == [3, 1, 1, 3]
    assert nearest_kept(distance_EE, torch.tensor([1, 3]), groups=2).tolist() == [1, 1, 3, 3]


def test_distances_are_those_of_the_experts_outputs() -> None:
    """Distances, usage and the cut that they lead to, against experts run one by one on all tokens."""
    model = tiny_model("mixtral", num_experts_per_tok=4)  # so that every token is compared
    anatomy, dense = discover(model.config), dense_decoder(model)
    criteria = ScoringCriteria(experts=Reap(), merges_experts=True)
    scores = score(dense, anatomy, criteria=criteria, calibration=CalibrationBatches(IDS, 2))
    forward, key = LayerwiseForward(dense, IDS, batch_size=4), "0.mlp.experts"
    wanted_EE, usage_E = torch.zeros(4, 4), torch.zeros(4)

    def see(module: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor], kwargs: dict[str, Tensor]) -> None:
        hidden_TD, index_TK, weight_TK = args
        weight_TE = torch.zeros(len(hidden_TD), 4).scatter(1, index_TK, weight_TK)
        alone = hidden_TD, torch.arange(4).expand_as(index_TK), torch.ones_like(weight_TK)
        output_ETD = torch.stack([one.output_TD for one in outputs_of_experts(module, alone, kwargs={}, count=4)])
        for one in range(4):
            square_ET = (output_ETD - output_ETD[one]).square().sum(-1)
            wanted_EE[one] = (square_ET * weight_TE[:, one].square()).sum(1)
        usage_E.add_(weight_TE.sum(0))

    with dense.layer(0) as layer:
        handle = layer.get_submodule("mlp.experts").register_forward_pre_hook(see, with_kwargs=True)
        forward.pass_through(0, layer)
        handle.remove()
    torch.testing.assert_close(scores.distances[key], wanted_EE, rtol=1e-3, atol=1e-3 * float(wanted_EE.max()))
    torch.testing.assert_close(scores.usage[key], usage_E, rtol=1e-4, atol=1e-4)
    cut = choose_cut(anatomy, scores, sizes=PlannedSizes((), 4, num_experts=4, merge_experts=True))
    assert not cut.merged
