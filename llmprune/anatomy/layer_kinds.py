"""Kinds of layers by index, and the layers whose removal leaves each other layer at an index of its kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from llmprune.anatomy.types import IndexKinds, LayerPattern

Kinds = tuple[tuple[str, ...], ...]  # by layer, its kind in each partition of the layers


def kinds_of(partitions: Sequence[IndexKinds | LayerPattern], num_layers: int) -> Kinds:
    """Return the kinds of every layer, one in each partition."""
    return tuple(tuple(one.kinds[index] for one in partitions) for index in range(num_layers))


def first_break(partition: IndexKinds | LayerPattern, keep: Sequence[int]) -> int | None:
    """Return the first index at which a kept layer is of another kind than the base's layer there; None if none is."""
    return next((new for new, old in enumerate(keep) if partition.kinds[old] != partition.kinds[new]), None)


def follow_from(kinds: Kinds, values: Sequence[Hashable]) -> bool:
    """Check that layers of the same kinds have the same value. Without kinds, all layers are of one."""
    return len(set(zip(kinds, values, strict=True))) == len(set(kinds)) if kinds else len(set(values)) == 1


def starts_of_spans(kinds: Kinds, length: int) -> tuple[int, ...]:
    """Return the first layers of the spans of ``length`` consecutive layers whose removal keeps the order of kinds."""
    count = len(kinds) - length
    return tuple(start for start in range(count + 1) if kinds[start + length :] == kinds[start:count])


def group_size(kinds: Kinds) -> int | None:
    """Return the fewest consecutive layers that can be removed from most places; None if there are none.

    With kinds that repeat, this is their period. The last layers can be removed in any number.
    """
    lengths = range(1, len(kinds))
    return next((one for one in lengths if 2 * len(starts_of_spans(kinds, one)) > len(kinds) - one + 1), None)
