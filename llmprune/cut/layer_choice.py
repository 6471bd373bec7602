"""Choice of layers that keeps the base model's pattern: the kinds of n kept layers are those of its first n layers.

Tools that derive a layer's kind (such as sliding or full attention) from its index then run every layer correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from llmprune.anatomy.types import Anatomy, LayerPattern
from llmprune.common.errors import RecipeError

Kinds = tuple[tuple[str, ...], ...]  # by layer, its kind in each pattern


def kinds_of(patterns: Sequence[LayerPattern], num_layers: int) -> Kinds:
    """Return the kinds of every layer, one in each pattern."""
    return tuple(tuple(pattern.kinds[index] for pattern in patterns) for index in range(num_layers))


def first_break(pattern: LayerPattern, keep: Sequence[int]) -> int | None:
    """Return the first position among the kept layers that breaks a pattern; None if none does."""
    return next((new for new, old in enumerate(keep) if pattern.kinds[old] != pattern.kinds[new]), None)


def possible_counts(anatomy: Anatomy) -> tuple[int, ...]:
    """Return the numbers of layers that can be kept in the pattern, with at least one of ``one_of`` among them."""
    kinds = kinds_of(anatomy.patterns, anatomy.num_layers)
    counts = range(1, anatomy.num_layers + 1)
    if not anatomy.one_of:
        return tuple(counts)
    needed = {kinds[index] for index in anatomy.one_of}
    return tuple(count for count in counts if needed & set(kinds[:count]))


def can_keep(kinds: Kinds, left: Collection[int], *, count: int) -> bool:
    """Check that ``count`` of the remaining layers ``left`` can be chosen in the pattern."""
    found = 0
    for index in sorted(left):
        if found < count and kinds[index] == kinds[found]:
            found += 1
    return found == count


def may_remain(anatomy: Anatomy, remove: int, *, keep_pattern: bool) -> Callable[[Collection[int]], bool]:
    """Return a check of the layers that remain while ``remove`` layers are removed one by one.

    It is False for those from which no allowed choice can be reached.
    """
    kinds, one_of = kinds_of(anatomy.patterns, anatomy.num_layers), set(anatomy.one_of)
    count = anatomy.num_layers - remove

    def check(left: Collection[int]) -> bool:
        some = not one_of or bool(one_of & set(left))
        return some and (not keep_pattern or can_keep(kinds, left, count=count))

    return check


def starts_in_pattern(anatomy: Anatomy, remove: int) -> tuple[int, ...]:
    """Return the first layers of the spans of ``remove`` consecutive layers whose removal keeps the pattern."""
    kinds, count = kinds_of(anatomy.patterns, anatomy.num_layers), anatomy.num_layers - remove
    return tuple(start for start in range(count + 1) if kinds[start + remove :] == kinds[start:count])


def choose_in_pattern(scores_N: Tensor, keep: int, *, anatomy: Anatomy) -> tuple[int, ...]:
    """Return the ``keep`` layers in the pattern with the highest sum of scores, ascending.

    Of equal sums the earlier layers are kept. At least one of the anatomy's ``one_of`` is kept, if that is not empty.
    Raises RecipeError if no choice has both.
    """
    kinds, scores = kinds_of(anatomy.patterns, anatomy.num_layers), scores_N.double().tolist()
    best = _best(kinds, scores, keep=keep)
    if anatomy.one_of and not set(anatomy.one_of) & set(best):
        large = 2 * (sum(map(abs, scores)) + 1)
        forced = [
            _best(kinds, [score + large * (index == one) for index, score in enumerate(scores)], keep=keep)
            for one in anatomy.one_of
        ]
        usable = [layers for layers in forced if set(anatomy.one_of) & set(layers)]
        if not usable:
            raise RecipeError(
                f"depth.keep_pattern: no choice of {keep} layers keeps both the pattern and one of layers "
                f"{list(anatomy.one_of)}, one of which must be kept; keep another number, or omit depth.keep_pattern"
            )
        best = max(usable, key=lambda layers: sum(scores[index] for index in layers))
    return best


def _best(kinds: Kinds, scores: Sequence[float], *, keep: int) -> tuple[int, ...]:
    """Find the best choice by dynamic programming over (layers seen, layers kept)."""
    found: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * keep]
    for index, score in enumerate(scores):
        for count in range(min(index + 1, keep), 0, -1):
            before, now = found[count - 1], found[count]
            if before is None or kinds[index] != kinds[count - 1]:
                continue
            if now is None or before[0] + score > now[0]:
                found[count] = before[0] + score, (*before[1], index)
    last = found[keep]
    assert last is not None, "the first layers follow the pattern"
    return last[1]
