"""Choice of layers after which each kept layer is of the kind that belongs at its index.

Kinds that the config derives from a layer's index must be kept, or the pruned model would be another. Patterns of the
base model's kinds are kept on request: tools that derive a layer's kind from its index then run every layer correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from llmprune.anatomy.layer_kinds import Kinds, group_size, kinds_of
from llmprune.anatomy.types import Anatomy, IndexKinds, LayerPattern
from llmprune.common.errors import RecipeError
from llmprune.cut.decision import choose_layers


def required_kinds(anatomy: Anatomy, *, keep_pattern: bool) -> Kinds:
    """Return the kinds that n kept layers must share with the first n layers; with ``keep_pattern``, the pattern's too.

    Empty where any layers may be kept.
    """
    partitions: list[IndexKinds | LayerPattern] = [*anatomy.by_index, *(anatomy.patterns if keep_pattern else ())]
    return kinds_of(partitions, anatomy.num_layers) if partitions else ()


def possible_counts(anatomy: Anatomy, *, keep_pattern: bool) -> tuple[int, ...]:
    """Return the numbers of layers that can be kept, with at least one of ``one_of`` among them."""
    kinds, counts = required_kinds(anatomy, keep_pattern=keep_pattern), range(1, anatomy.num_layers + 1)
    if not anatomy.one_of or not kinds:
        return tuple(counts)
    needed = {kinds[index] for index in anatomy.one_of}
    return tuple(count for count in counts if needed & set(kinds[:count]))


def layers_in_group(anatomy: Anatomy) -> int:
    """Return the number of consecutive layers that a search removes together, 1 unless their kinds are by index."""
    return group_size(required_kinds(anatomy, keep_pattern=False)) or 1


def longest_choice(kinds: Kinds, left: Collection[int]) -> tuple[int, ...]:
    """Return as many as possible of the layers ``left`` so that each is of the kind that belongs at its index."""
    found: list[int] = []
    for index in sorted(left):
        if kinds[index] == kinds[len(found)]:
            found.append(index)
    return tuple(found)


def may_remain(anatomy: Anatomy, remove: int, *, kinds: Kinds) -> Callable[[Collection[int]], bool]:
    """Return a check of the layers that remain while ``remove`` layers are removed one by one.

    It is False for those from which no allowed choice can be reached. ``kinds``: as of ``required_kinds``.
    """
    one_of, count = set(anatomy.one_of), anatomy.num_layers - remove

    def check(left: Collection[int]) -> bool:
        some = not one_of or bool(one_of & set(left))
        return some and (not kinds or len(longest_choice(kinds, left)) >= count)

    return check


def may_be_left(anatomy: Anatomy, left: Collection[int]) -> bool:
    """Check that a model can consist of the layers ``left``: each of its kind, and one of those that it needs."""
    kinds, one_of = required_kinds(anatomy, keep_pattern=False), set(anatomy.one_of)
    some = bool(one_of & set(left)) if one_of else bool(left)
    return some and (not kinds or len(longest_choice(kinds, left)) == len(left))


def removable_layers(kinds: Kinds, remove: int) -> tuple[int, ...]:
    """Return the layers that are in at least one set of ``remove`` layers that can be removed together."""
    count, keep = len(kinds), len(kinds) - remove
    before = [{0}]  # numbers of layers that can be kept of those before each layer
    for index in range(count):
        before.append({*before[-1], *(one + 1 for one in before[-1] if one < keep and kinds[index] == kinds[one])})
    after = {keep}  # numbers of layers kept before an index from which the rest can be reached
    found = []
    for index in reversed(range(count)):
        if before[index] & after:
            found.append(index)
        after |= {one - 1 for one in after if one and kinds[index] == kinds[one - 1]}
    return tuple(reversed(found))


def smallest_removal(kinds: Kinds, named: Collection[int]) -> tuple[int, ...]:
    """Return the fewest layers that can be removed together and contain the named ones; in whole groups if equal."""
    count = len(kinds)
    kept = longest_choice(kinds, set(range(count)) - set(named))
    whole = _whole_groups(kinds, named)
    rest = set(range(count)) - set(whole)
    if len(longest_choice(kinds, rest)) == len(rest) >= len(kept):
        return whole
    return tuple(index for index in range(count) if index not in kept)


def _whole_groups(kinds: Kinds, named: Collection[int]) -> tuple[int, ...]:
    """Return the named layers, each with the layers behind it that complete a group."""
    size, left = group_size(kinds) or 1, list(range(len(kinds)))
    for index in sorted(named):
        if index in left:
            start = left.index(index)
            del left[start : start + size]
    return tuple(index for index in range(len(kinds)) if index not in left)


def choose_in_pattern(scores_N: Tensor, keep: int, *, anatomy: Anatomy, keep_pattern: bool) -> tuple[int, ...]:
    """Return the ``keep`` layers of the required kinds with the highest sum of scores, ascending.

    Of equal sums the earlier layers are kept. At least one of the anatomy's ``one_of`` is kept, if that is not empty.
    Raises RecipeError if no choice has both.
    """
    kinds, scores = required_kinds(anatomy, keep_pattern=keep_pattern), scores_N.double().tolist()
    if not kinds:
        return choose_layers(scores_N, keep, one_of=anatomy.one_of)
    best = _best(kinds, scores, keep=keep)
    if anatomy.one_of and not set(anatomy.one_of) & set(best):
        large = 2 * (sum(map(abs, scores)) + 1)
        forced = [
            _best(kinds, [score + large * (index == one) for index, score in enumerate(scores)], keep=keep)
            for one in anatomy.one_of
        ]
        usable = [layers for layers in forced if set(anatomy.one_of) & set(layers)]
        if not usable:
            key, what, or_else = "depth", "each layer at an index of its kind", ""
            if keep_pattern:
                key, what, or_else = "depth.keep_pattern", "the pattern", ", or omit depth.keep_pattern"
            raise RecipeError(
                f"{key}: no choice of {keep} layers keeps both {what} and one of layers "
                f"{list(anatomy.one_of)}, one of which must be kept; keep another number{or_else}"
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
