"""Turn the number or the indices of layers that a recipe removes into the layers to keep.

Everything here is known before the scores. Where the scores will choose the layers, the plan assumes that layers from
the middle of the model are removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.anatomy.layer_kinds import first_break
from llmprune.anatomy.types import Anatomy
from llmprune.common.errors import RecipeError
from llmprune.cut.layer_choice import (
    choose_in_pattern,
    may_be_left,
    possible_counts,
    required_kinds,
    smallest_removal,
)
from llmprune.recipe.depth import Depth
from llmprune.results.formatting import plural, ranges


def planned_layers(depth: Depth | None, anatomy: Anatomy) -> tuple[int, ...]:
    """Return the layers to keep; where the scores will decide, as many layers, without those in the middle.

    Raises RecipeError for a number or indices that the model does not allow.
    """
    count = anatomy.num_layers
    if depth is None:
        return tuple(range(count))
    number = _number_removed(depth, count)
    if number and anatomy.depth_refusal:
        raise RecipeError(f"depth: no layer of this model can be removed: {anatomy.depth_refusal}; remove the section")
    if depth.layers is not None:
        keep = [index for index in range(count) if index not in depth.layers]
        _require_kinds_by_index(keep, anatomy)
        if depth.keep_pattern:
            _require_pattern(keep, anatomy)
        return tuple(keep)
    if depth.keep_pattern or anatomy.by_index:
        _require_possible(count - number, anatomy, keep_pattern=depth.keep_pattern)
        scores_N = _distances_from_the_middle(count)
        return choose_in_pattern(scores_N, count - number, anatomy=anatomy, keep_pattern=depth.keep_pattern)
    removed = _from_the_middle(count, number, one_of=anatomy.one_of)
    return tuple(index for index in range(count) if index not in removed)


def _number_removed(depth: Depth, count: int) -> int:
    """Return the number of layers to remove. Raises RecipeError for more than the model can lack."""
    if depth.layers is not None:
        number = len(depth.layers)
        outside = [index for index in depth.layers if index >= count]
        if outside:
            raise RecipeError(f"depth.layers: the model has layers 0 to {count - 1}, not {outside}; correct the list")
    else:
        number = depth.remove if depth.remove is not None else count - (depth.keep or 0)
    if number < 0:
        raise RecipeError(
            f"depth.keep: the model has {count} layers, {depth.keep} cannot be kept; keep at most {count}"
        )
    if number >= count:
        raise RecipeError(
            f"depth.{'layers' if depth.layers else 'remove'}: {number} of the model's {count} layers would be removed; "
            f"at least one must stay: {f'remove at most {count - 1}' if count > 1 else 'remove the section'}"
        )
    return number


def _distances_from_the_middle(count: int) -> Tensor:
    """Score layers, float64 [N], so that those in the middle are removed first."""
    return (torch.arange(count) - count // 2).abs().double()


def _from_the_middle(count: int, number: int, *, one_of: tuple[int, ...]) -> list[int]:
    """Return ``number`` layers to remove, from the middle outwards; the first of ``one_of`` is never among them."""
    free = [index for index in range(count) if index not in one_of[:1]]
    outwards = sorted(free, key=lambda index: abs(index - count // 2))
    return outwards[:number]


def _require_possible(kept: int, anatomy: Anatomy, *, keep_pattern: bool) -> None:
    possible = possible_counts(anatomy, keep_pattern=keep_pattern)
    if kept not in possible:
        key, or_else = ("depth.keep_pattern", ", or leave depth.keep_pattern out") if keep_pattern else ("depth", "")
        raise RecipeError(
            f"{key}: none of the first {kept} of {anatomy.num_layers} layers has full attention, and the "
            f"model needs one that has; keep {ranges(possible)} layers{or_else}"
        )


def _require_pattern(keep: Sequence[int], anatomy: Anatomy) -> None:
    for pattern in anatomy.patterns:
        new = first_break(pattern, keep)
        if new is not None:
            raise RecipeError(
                f"depth.keep_pattern: without depth.layers layer {keep[new]} would become layer {new}, which is "
                f"{pattern.kinds[keep[new]]} where {pattern.name}, repeating every {pattern.period} layers, has "
                f"{pattern.kinds[new]}; name other layers, or give depth.remove and let the scores choose"
            )


def _require_kinds_by_index(keep: Sequence[int], anatomy: Anatomy) -> None:
    removed = [index for index in range(anatomy.num_layers) if index not in keep]
    for partition in anatomy.by_index:
        new = first_break(partition, keep)
        if new is not None:
            old, kinds = keep[new], partition.kinds
            name = "" if partition.name == "class" else f"{partition.name} "
            raise RecipeError(
                f"depth.layers: without {'layer' if len(removed) == 1 else 'layers'} {ranges(removed)}, layer {old} "
                f"would become layer {new}, and this model's config derives the kind of a layer from its index: "
                f"{name}{kinds[new]} for {new}, {kinds[old]} for {old}; {_nearest(removed, anatomy)}"
            )


def _nearest(removed: Sequence[int], anatomy: Anatomy) -> str:
    """Return the remedy for layers that cannot be removed: the fewest that can and contain them, or a number."""
    wider = smallest_removal(required_kinds(anatomy, keep_pattern=False), removed)
    if not may_be_left(anatomy, set(range(anatomy.num_layers)) - set(wider)):
        return f"give depth.remove: {len(removed)} and let the scores choose"
    number = len(wider)
    return (
        f"name layers {ranges(wider)}, {plural(number, 'layer')} that can be removed together, or give "
        f"depth.remove: {number} and let the scores choose"
    )
