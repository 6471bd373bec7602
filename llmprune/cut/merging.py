"""Merge removed experts into kept ones: the average of their weights, by usage, neuron by neuron.

The neurons of an expert have no order, so those of a removed expert are first matched to those of the kept one: the
assignment with the largest sum of products of their weights (weight matching, Git Re-Basin, arXiv 2209.04836, as
M-SMoE, arXiv 2310.01334, merges experts). Rows of the router are averaged as well: that lost a little less than the
kept expert's own row.

Shapes: E experts, F neurons of an expert, X all weights of a neuron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.anatomy.selection import neuron_rows, select_neurons
from llmprune.anatomy.types import ExpertBlock, MlpUnit, PrunableDim
from llmprune.layerwise.decoder import Tensors


def nearest_kept(distance_EE: Tensor, keep: Tensor, *, groups: int = 1) -> Tensor:
    """Return for each expert the kept one that is nearest to it, itself if kept, int64 [E].

    ``groups``: experts are merged within the groups of consecutive ones that the router chooses.
    """
    count = len(distance_EE)
    is_kept_E = torch.zeros(count, dtype=torch.bool).index_fill(0, keep, True)
    group_E = torch.arange(count) // (count // groups)
    possible_EE = is_kept_E & (group_E.unsqueeze(1) == group_E)
    nearest_E = distance_EE.masked_fill(~possible_EE, torch.inf).argmin(1)
    return torch.where(is_kept_E, torch.arange(count), nearest_E)


def merge_experts(tensors: Tensors, unit: MlpUnit, *, block: ExpertBlock, merged_E: Tensor, usage_E: Tensor) -> Tensors:
    """Return a layer's tensors with every kept expert replaced by the average of those that are merged into it.

    ``merged_E``: of each expert the one that it is merged into; ``usage_E``: its weight in the average.
    """
    aligned = {prunable.name: replace(prunable, dim=prunable.dim - 1) for prunable in unit.tensors}
    names = [one.name for one in block.tensors if one.dim == 0]
    merged = {name: tensors[name].clone() for name in names}
    for kept, members in _clusters(merged_E):
        share = usage_E[[kept, *members]].double().clamp_min(1e-30)
        share /= share.sum()
        total = {name: tensors[name][kept].float() * float(share[0]) for name in names}
        base_FX = _neurons(tensors, unit, expert=kept)
        for place, member in enumerate(members, start=1):
            order_F = _matched(base_FX, _neurons(tensors, unit, expert=member))
            for name in names:
                own = tensors[name][member]
                if name in aligned:
                    own = select_neurons(own, aligned[name], keep=order_F)
                total[name] += own.float() * float(share[place])
        for name in names:
            merged[name][kept] = total[name].to(merged[name].dtype)
    return {**tensors, **merged}


def _clusters(merged_E: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Yield every kept expert into which others are merged, and these."""
    into = merged_E.tolist()
    for kept in sorted(set(into)):
        members = [expert for expert, target in enumerate(into) if target == kept and expert != kept]
        if members:
            yield kept, members


def _neurons(tensors: Tensors, unit: MlpUnit, *, expert: int) -> Tensor:
    """Return all weights of each neuron of an expert, float32 [F, X]."""
    rows = []
    for prunable in unit.tensors:
        own = PrunableDim(prunable.name, prunable.dim - 1, prunable.parts)
        rows.append(neuron_rows(tensors[prunable.name][expert], own).flatten(1).float())
    return torch.cat(rows, dim=1)


def _matched(base_FX: Tensor, other_FX: Tensor) -> Tensor:
    """Return the neuron of the other expert that is matched to each of the base's, int64 [F]."""
    from scipy.optimize import linear_sum_assignment

    product_FF = (base_FX @ other_FX.T).cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(product_FF, maximize=True)[1]).long()
