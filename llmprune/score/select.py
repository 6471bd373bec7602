"""Selection of a cut: of all cuts to the planned sizes, the one that keeps the highest scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.cut.decision import Cut, choose_highest, choose_in_groups
from llmprune.cut.layer_choice import choose_in_pattern
from llmprune.cut.merging import nearest_kept
from llmprune.score.scores import Scores


@dataclass(frozen=True)
class PlannedSizes:
    """Sizes of the pruned model, as the recipe sets them.

    ``removed_layers``: layers that the recipe names; None: the scores choose the ``keep_layers`` layers to keep.
    ``widths``: neurons kept, by config field. ``num_experts`` and ``kv_groups``: kept in every layer,
    ``hidden_size``: residual channels kept; None: all.
    """

    removed_layers: tuple[int, ...] | None
    keep_layers: int
    widths: Mapping[str, int] = field(default_factory=dict)
    num_experts: int | None = None
    kv_groups: int | None = None
    hidden_size: int | None = None
    merge_experts: bool = False  # removed experts are merged into kept ones
    keep_pattern: bool = False  # choose layers only so that their kinds repeat as in the base model


def choose_cut(anatomy: Anatomy, scores: Scores | None, *, sizes: PlannedSizes) -> Cut:
    """Return the cut to the planned sizes that keeps what scores highest."""
    count, num_experts, kv_groups = anatomy.num_layers, sizes.num_experts, sizes.kv_groups
    if sizes.removed_layers is not None:
        layers = tuple(index for index in range(count) if index not in sizes.removed_layers)
    else:
        assert scores is not None, "layers are scored where the recipe does not name them"
        assert scores.layers is not None
        layers = choose_in_pattern(scores.layers, sizes.keep_layers, anatomy=anatomy, keep_pattern=sizes.keep_pattern)
    if scores is None:
        return Cut(count, layers)
    narrower = {field: kept for field, kept in sizes.widths.items() if kept < anatomy.widths[field]}
    neurons = {
        unit_key(index, unit.path): choose_highest(
            scores.neurons[unit_key(index, unit.path)], unit.times * narrower[unit.field]
        )
        for index, units in enumerate(anatomy.units)
        for unit in units
        if unit.field in narrower
    }
    cut = Cut(count, layers, narrower, neurons)
    if num_experts is not None and anatomy.experts is not None and num_experts != anatomy.experts.count:
        groups = anatomy.experts.groups
        experts = {
            key: choose_in_groups(scores_E, num_experts, groups=groups) for key, scores_E in scores.experts.items()
        }
        cut = replace(cut, num_experts=num_experts, experts=experts)
        if sizes.merge_experts:
            merged = {key: nearest_kept(scores.distances[key], keep, groups=groups) for key, keep in experts.items()}
            cut = replace(cut, merged=merged, usage={key: scores.usage[key] for key in experts})
    if kv_groups is not None and anatomy.heads is not None and kv_groups != anatomy.heads.count:
        heads = {key: choose_highest(scores_G, kv_groups) for key, scores_G in scores.heads.items()}
        cut = replace(cut, kv_groups=kv_groups, heads=heads)
    if sizes.hidden_size is not None:
        scores_D = torch.stack([*scores.hidden.values()]).sum(0)
        cut = replace(cut, hidden=choose_highest(scores_D, sizes.hidden_size))
    return cut
