"""Note on the layers that the scores may remove where a config derives the kinds of layers from their index."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.anatomy.layer_kinds import group_size
from llmprune.anatomy.types import Anatomy
from llmprune.cut.layer_choice import removable_layers, required_kinds
from llmprune.recipe.depth import Depth
from llmprune.results.formatting import ranges


def about_index_kinds(depth: Depth, anatomy: Anatomy, *, keep: Sequence[int]) -> list[str]:
    """Return a note on the layers that may be removed; none where the recipe names them, or any may."""
    number = anatomy.num_layers - len(keep)
    if depth.layers is not None or not anatomy.by_index or not number:
        return []
    kinds = required_kinds(anatomy, keep_pattern=False)
    layers, size = removable_layers(kinds, number), group_size(kinds)
    names = ", ".join("its class" if one.name == "class" else one.name for one in anatomy.by_index)
    reason = f"depth: the config derives the kind of a layer from its index ({names})"
    if len(layers) > number:
        may = f"the scores choose {number} of layers {ranges(layers)} so that the others are at indices of their kind"
    else:
        may = f"only {'layer' if number == 1 else 'layers'} {ranges(layers)} can be removed"
    return [f"{reason}: {may}{_remedy(number, size, count=anatomy.num_layers)}"]


def _remedy(number: int, size: int | None, *, count: int) -> str:
    """Return the numbers of layers that leave more to the scores: whole groups."""
    if not size or not number % size:
        return ""
    near = (number // size * size, (number // size + 1) * size)
    whole = [str(one) for one in near if 0 < one < count]
    return f"; remove {' or '.join(whole)} for a free choice among groups of {size}" if whole else ""
