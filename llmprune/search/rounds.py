"""Rounds of a search: fewer and fewer shapes, judged on more and more.

Shapes: N windows, S sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmprune.anatomy.types import Anatomy
from llmprune.cut.decision import Cut
from llmprune.recipe.refit import Refit
from llmprune.search.choice import Divergences, broken_sources, ranked, score
from llmprune.search.judging import Judge
from llmprune.search.repaired import RepairWindows, repaired_divergence
from llmprune.search.side_by_side import divergences
from llmprune.search.trials import Trials

_SECOND, _LAST = "second", "last"


@dataclass(frozen=True)
class Tried:
    """A cut that was tried. ``rounds``: its divergences in each round; ``broken``: the source on which it is."""

    cut: Cut
    rounds: tuple[Divergences, ...]
    broken: int | None = None

    @property
    def divergence(self) -> Divergences:
        """Divergences of its last round."""
        return self.rounds[-1]

    @property
    def kept(self) -> float:
        """Share of the layers that it keeps."""
        return len(self.cut.layers) / self.cut.num_layers

    @property
    def scores(self) -> tuple[float, ...]:
        """Score in each round."""
        return tuple(score(one, self.kept) for one in self.rounds)


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
        return [Tried(cut, (one,)) for cut, one in zip(cuts, found, strict=True)]

    def halve(self, tried: Sequence[Tried], *, counts: tuple[int, int]) -> Iterator[list[Tried]]:
        """Yield the cuts of one budget, the best first, after each round. ``tried``: those of the first round.

        ``counts``: cuts that the second and the last round try.
        """
        best_first = _best_first(tried)
        yield best_first
        for number, count in enumerate(counts if self.refit else ()):
            entering = [self.repaired(one, last=bool(number)) for one in best_first[:count]]
            best_first = _best_first(entering) + best_first[count:]
            yield best_first

    def repaired(self, tried: Tried, *, last: bool = False) -> Tried:
        """Try a cut with its repair, in the second or the last round."""
        assert self.refit is not None, "the recipe repairs"
        repair = partial(repaired_divergence, self.judge, self.anatomy, refit=self.refit, solved=self.repairs[last])
        found = self.trials.alone(_LAST if last else _SECOND, tried.cut, judge=lambda one: repair(cut=one))
        return replace(tried, rounds=(*tried.rounds, found))


def _best_first(tried: Sequence[Tried]) -> list[Tried]:
    """Return cuts of a round, the best first, with the sources on which some are broken."""
    found = [one.divergence for one in tried]
    broken = broken_sources(found)
    order = ranked(found, [one.kept for one in tried])
    return [replace(tried[number], broken=broken[number]) for number in order]
