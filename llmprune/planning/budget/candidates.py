"""Candidates of a search: the shapes that meet a budget and could not grow along any axis, thinned to a few.

A candidate is maximal and lies within the tolerance of at least one limit. The thinned set spans every axis: shapes
that give along one axis alone, one that gives half along layers and half along neurons, and for each number of groups
and experts shapes that are spread over the numbers of layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.common.errors import RecipeError
from llmprune.cut.shape import Shape
from llmprune.planning.budget.limits import Limits, SpeedOf, amount
from llmprune.planning.budget.sizes import ShapeSizes
from llmprune.planning.budget.space import AXES, Place, SearchSpace, moved
from llmprune.planning.budget.unmet import beyond_tolerance, met_by_vocabulary, unreachable


@dataclass(frozen=True)
class Candidate:
    """A shape with its sizes, and the number of axes along which it is smaller than the dense model.

    ``speed``: generated tokens a second, times the dense model's; None without a table.
    """

    shape: Shape
    sizes: ShapeSizes
    cut_axes: int
    speed: float | None = None


@dataclass(frozen=True)
class Candidates:
    """The candidates for one model. ``limits``: in absolute numbers; ``found``: all, ``tried``: some that span them."""

    limits: Limits
    found: tuple[Candidate, ...]
    tried: tuple[Candidate, ...]

    @property
    def nominal(self) -> Candidate:
        """The tried candidate that cuts most axes, so that a plan of it has the cost of all; nearest the middle."""
        most = max(one.cut_axes for one in self.tried)
        layers = [one.shape.layers for one in self.tried]
        middle = (min(layers) + max(layers)) / 2
        return min((one for one in self.tried if one.cut_axes == most), key=lambda one: abs(one.shape.layers - middle))


def candidates(space: SearchSpace, limits: Limits, *, speed: SpeedOf | None = None) -> Candidates:
    """Return the candidates for the limits of one model, the same for the same input.

    ``speed``: predicts a shape's speed; without it a limit of the speed is not applied. Raises RecipeError where no
    shape meets the limits, none is within the tolerance of one, or fewer tokens alone meet them.
    """
    judge = _Judge(space, limits, speed=speed)
    if space.tokens is not None and judge.meets(space.place(space.largest)):
        raise RecipeError(met_by_vocabulary(space, judge.limits, speed=speed))
    if not judge.meets(space.place(space.smallest)):
        raise RecipeError(unreachable(space, judge.limits, speed=speed))
    maximal = judge.maximal()
    found = [place for place in maximal if judge.is_near(place)]
    if not found:
        nearest = max(maximal, key=judge.used)
        alone = [name for name, value in limits.items() if _is_met_alone(space, {name: value}, speed=speed)]
        shape, used = space.shape(nearest), judge.used(nearest)
        raise RecipeError(beyond_tolerance(space, judge.limits, shape=shape, used=used, alone=alone))
    tried = _thinned(found, space)
    return Candidates(limits, tuple(map(judge.candidate, sorted(found))), tuple(map(judge.candidate, sorted(tried))))


def one_step_further(space: SearchSpace, shape: Shape, *, speed: SpeedOf | None = None) -> dict[str, Candidate]:
    """Return by axis the shape one step smaller along it, for the axes that have a smaller value."""
    judge, place = _Judge(space, {}, speed=speed), space.place(shape)
    return {
        name: judge.candidate(moved(place, axis, steps=1))
        for axis, name in enumerate(AXES)
        if place[axis] + 1 < space.lengths[axis]
    }


class _Judge:
    """Judges places of a space by the limits of one model. ``limits``: those that can be applied."""

    def __init__(self, space: SearchSpace, limits: Limits, *, speed: SpeedOf | None) -> None:
        self._space, self._speed = space, speed
        self.limits = {name: value for name, value in limits.items() if name != "speed" or speed is not None}
        self._used: dict[Place, float] = {}

    def candidate(self, place: Place) -> Candidate:
        """Return the shape at a place with its sizes and its speed."""
        shape = self._space.shape(place)
        cut = sum(steps > 0 for steps in place)
        return Candidate(shape, self._space.counter.sizes(shape), cut, self._speed(shape) if self._speed else None)

    def used(self, place: Place) -> float:
        """Return the largest part of a limit that a shape uses up; at most 1 where it meets them all."""
        if place not in self._used:
            one = self.candidate(place)
            self._used[place] = max(self._part(name, one) for name in self.limits)
        return self._used[place]

    def meets(self, place: Place) -> bool:
        """Check that a shape meets every limit."""
        return self.used(place) <= 1

    def is_near(self, place: Place) -> bool:
        """Check that a shape is within the tolerance of at least one limit."""
        return self.used(place) >= 1 - self._space.budget.tolerance

    def maximal(self) -> list[Place]:
        """Return the shapes that meet every limit, and would break one with one step more along any axis."""
        met = [place for row in self._space.rows() if (place := self._first_met(row)) is not None]
        return [
            place
            for place in met
            if not any(place[axis] and self.meets(moved(place, axis, steps=-1)) for axis in range(len(AXES)))
        ]

    def _first_met(self, row: Sequence[Place]) -> Place | None:
        """Return the largest shape of a row, which gets smaller, that meets the limits; None if none does."""
        index = bisect_left(row, True, key=self.meets)
        return row[index] if index < len(row) else None

    def _part(self, name: str, one: Candidate) -> float:
        if name == "speed":
            assert one.speed is not None, "without a prediction the limit is not applied"
            return self.limits[name] / one.speed
        return amount(name, one.sizes, budget=self._space.budget) / self.limits[name]


def _is_met_alone(space: SearchSpace, limits: Limits, *, speed: SpeedOf | None) -> bool:
    """Check that a shape is within the tolerance of a single limit."""
    judge = _Judge(space, limits, speed=speed)
    return bool(judge.limits) and any(map(judge.is_near, judge.maximal()))


def _thinned(found: Sequence[Place], space: SearchSpace) -> set[Place]:
    """Return at most as many of the places as the budget tries."""
    most = space.budget.most_shapes
    if len(found) <= most:
        return set(found)
    chosen = set(sorted(_one_sided(found, space))[:most])
    rows: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for place in sorted(found):
        rows[place[2], place[3]].append(place)  # by numbers of groups and experts
    order = _spread(sorted(rows))
    while len(chosen) < most:
        for key in order:
            left = [place for place in rows[key] if place not in chosen]
            if left and len(chosen) < most:
                chosen.add(_farthest(left, [place for place in rows[key] if place in chosen]))
    return chosen


def _one_sided(found: Sequence[Place], space: SearchSpace) -> set[Place]:
    """Return the places that give along a single axis, and the one that gives half each along layers and neurons."""
    single = {place for place in found if sum(steps > 0 for steps in place) == 1}
    both = [place for place in found if place[0] and place[1] and not place[2] and not place[3]]

    def imbalance(place: Place) -> float:
        whole, left = (space.counter.sizes(one).parameters for one in (space.largest, space.shape(place)))
        by_layers = whole - space.counter.sizes(space.shape((place[0], 0, 0, 0))).parameters
        return abs(by_layers / (whole - left) - 0.5)

    return single | ({min(both, key=imbalance)} if both else set())


def _spread(keys: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return keys in an order whose first ones are spread over all of them: both ends, then the middle of each gap."""
    order = [0]
    while len(order) < len(keys):
        order.append(max(range(len(keys)), key=lambda index: (min(abs(index - one) for one in order), -index)))
    return [keys[index] for index in order]


def _farthest(left: Sequence[Place], chosen: Sequence[Place]) -> Place:
    """Return the place whose number of layers is farthest from those chosen; the middle one where there is none."""
    if not chosen:
        return left[len(left) // 2]
    return max(left, key=lambda place: (min(abs(place[0] - one[0]) for one in chosen), -place[0]))
