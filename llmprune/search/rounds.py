"""Rounds of a search: fewer and fewer shapes, judged on more and more.

Shapes: N windows, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmprune.anatomy.types import Anatomy
from llmprune.cut.decision import Cut
from llmprune.recipe.refit import Refit
from llmprune.search.choice import Divergences, broken_sources, ranked
from llmprune.search.judging import Judge
from llmprune.search.repaired import RepairWindows, repaired_divergence
from llmprune.search.side_by_side import divergences
from llmprune.search.trials import Trials

_SECOND, _LAST = "second", "last"


@dataclass(frozen=True)
class Tried:
    """A cut that was tried. ``broken``: the source on which it is; ``rounds``: that it took part in."""

    cut: Cut
    divergence: Divergences
    rounds: int
    repaired: bool
    broken: int | None = None


@dataclass(frozen=True)
class Rounds:
    """Settings of the rounds. ``repairs``: the windows that the second and the last round's repairs are solved on.

    ``refit``: None where the recipe repairs nothing: then the first round decides.
    """

    judge: Judge
    anatomy: Anatomy
    refit: Refit | None
    repairs: tuple[RepairWindows, RepairWindows]
    trials: Trials

    def first(self, cuts: Sequence[Cut]) -> list[Tried]:
        """Try cuts without repair, side by side."""
        found = self.trials.together("first", cuts, judge=lambda some: divergences(self.judge, self.anatomy, cuts=some))
        return _marked([Tried(cut, one, 1, repaired=False) for cut, one in zip(cuts, found, strict=True)])

    def halve(self, tried: Sequence[Tried], *, counts: tuple[int, int]) -> list[Tried]:
        """Return the cuts of one budget, the best first, after all rounds. ``tried``: those of the first round.

        ``counts``: cuts that the second and the last round try.
        """
        best_first = [tried[number] for number in ranked([one.divergence for one in tried])]
        if self.refit is None:
            return best_first
        for number, count in enumerate(counts):
            again = _marked([self.repaired(one.cut, last=bool(number)) for one in best_first[:count]])
            order = ranked([one.divergence for one in again])
            best_first = [again[index] for index in order] + best_first[count:]
        return best_first

    def repaired(self, cut: Cut, *, last: bool = False) -> Tried:
        """Try a cut with its repair."""
        assert self.refit is not None, "the recipe repairs"
        repair = partial(repaired_divergence, self.judge, self.anatomy, refit=self.refit, solved=self.repairs[last])
        found = self.trials.alone(_LAST if last else _SECOND, cut, judge=lambda one: repair(cut=one))
        return Tried(cut, found, 3 if last else 2, repaired=True)


def _marked(tried: Sequence[Tried]) -> list[Tried]:
    """Return cuts of a round, with the sources on which some are broken."""
    broken = broken_sources([one.divergence for one in tried])
    return [replace(one, broken=source) for one, source in zip(tried, broken, strict=True)]
