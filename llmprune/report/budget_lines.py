"""Lines of a plan on its budget: the candidates for each size, and what the search for one costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmprune.common.schema import format_count
from llmprune.results.formatting import plural
from llmprune.results.sentences.search import AXES, describe_amount, describe_limits

if TYPE_CHECKING:
    from llmprune.planning.budget.plan import AxisRange, BudgetMember, BudgetPlan, VocabularyPart


def budget_lines(budget: BudgetPlan) -> Iterator[str]:
    """Yield a line for each model of the family with the range of each axis, and lines on the search."""
    about = "" if budget.exact else "about "
    for member in budget.members:
        yield f"Budget: {describe_limits(member.limits)}: {_candidates(member, about)}"
        yield f"  {'; '.join(map(_range, member.axes))}"
        yield from (f"  {_vocabulary(name, part)}" for name, part in member.vocabulary.items())
    search = budget.search
    first, *later = search.rounds
    passes = search.order_passes + search.forward_passes
    repaired = f", then {' and '.join(map(str, later))} of them repaired" if later else ""
    yield (
        f"Search: {plural(first, 'shape')} on {plural(search.judged_windows, 'window')} of {search.judged_tokens} "
        f"tokens{repaired}; with {search.further} that go a step further "
        f"about {passes:.1f} forward passes over the calibration tokens"
    )
    of_largest = " for the largest model of the family" if len(budget.members) > 1 else ""
    yield (
        f"The search chooses the shape. Sizes, memory and time here are those of one candidate{of_largest}: "
        f"{budget.nominal}"
    )


def _candidates(member: BudgetMember, about: str) -> str:
    """Return the number of candidates, and the names and sizes of the largest and the smallest."""
    if member.candidates == 1:
        return f"one shape, {member.largest.name} ({about}{format_count(member.largest.parameters)} parameters)"
    ends = " to ".join(
        f"{shape.name} ({about}{format_count(shape.parameters)})" for shape in (member.largest, member.smallest)
    )
    tried = "all" if member.tried == member.candidates else f"{member.tried}"
    return f"{plural(member.candidates, 'shape')}, of which {tried} are tried, from {ends}"


def _vocabulary(name: str, part: VocabularyPart) -> str:
    tokens, rest = (describe_amount(name, amount) for amount in (part.by_tokens, part.by_shape))
    return f"of the reduction, the vocabulary takes {tokens}; for the shape remain {rest}"


def _range(axis: AxisRange) -> str:
    values = f"{axis.most:,}" if axis.least == axis.most else f"{axis.least:,}–{axis.most:,}"
    return f"{AXES[axis.name]} {values} of {axis.dense:,}"
