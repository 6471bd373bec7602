"""Results of the search for a shape under a budget: the shapes that were tried, and the one that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import Field

from llmprune.results.figures.base import Figures

REPEATED = "repeated"  # source of windows whose first half comes twice, judged on the second


class TriedShape(Figures):
    """A shape that the search tried, with its sizes and its divergence from the dense model.

    ``name``: such as ``26 layers, 1280 neurons, 2 groups``. ``removed``: indices of the layers that it lacks.
    ``speed``: predicted generation speed, times the dense model's. ``divergence``: KL(dense ‖ shape) in nats per token
    by source, from the last round that the shape took part in. ``score``: their geometric mean, times the dense model's
    layers over those kept; the lowest is chosen. ``scores``: of every round that it took part in; shapes are compared
    in the last round of both. ``repaired``: its layers were refit before it was judged, as from the second round on.
    ``broken``: the source that it fails on, far more than the other shapes do.
    """

    name: str
    layers: int
    removed: tuple[int, ...]
    widths: dict[str, int]
    kv_groups: int | None
    experts: int | None
    parameters: int
    active_parameters: int
    bytes: int
    kv_bytes_per_token: int | None
    speed: float | None = None
    divergence: dict[str, float]
    score: float
    scores: tuple[float, ...]
    repaired: bool
    broken: str | None = None
    size: int = 0  # index of the budget in a family that the shape was tried for
    further: str | None = None  # the axis in which it goes one step beyond the chosen shape; None for a candidate

    @property
    def rounds(self) -> int:
        """Rounds of the search that the shape took part in."""
        return len(self.scores)

    def compared(self, other: TriedShape) -> tuple[float, float]:
        """Return the scores of this shape and another one in the last round that both took part in."""
        last = min(self.rounds, other.rounds) - 1
        return self.scores[last], other.scores[last]


class ChosenShape(Figures):
    """The shape chosen for one budget. ``limits``: of the budget, in absolute numbers, by name."""

    name: str  # of a tried shape
    limits: dict[str, float]
    candidates: int  # shapes that meet the budget
    tried: int  # of them
    measured_speed: float | None = None  # end to end, times the dense model's; None where the budget has no speed


class SearchFigures(Figures):
    """Search for the shapes of one or several budgets.

    ``vocabulary``: tokens that every shape keeps, whose sizes count no others; None if all are kept. ``order``: layers
    in the order of their removal. ``windows``, ``tokens``: that shapes were judged on. ``forward_passes``: cost, in
    plain forward passes of the dense model over the calibration tokens. ``member``: index of the budget that the
    reported model was made for, in the reports of a family.
    """

    dense_parameters: int
    dense_bytes: int
    dense_layers: int
    dense_widths: dict[str, int] = Field({})  # by config field
    dense_kv_groups: int | None = None
    dense_experts: int | None = None
    vocabulary: int | None = None
    tried: tuple[TriedShape, ...]
    chosen: tuple[ChosenShape, ...]  # one for each budget
    order: tuple[int, ...]
    sources: tuple[str, ...]
    windows: int
    tokens: int
    forward_passes: float
    seconds: float
    notes: tuple[str, ...] = ()
    member: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Indices of the budgets that are reported: that of the member, or all that have a chosen shape."""
        return tuple(range(len(self.chosen))) if self.member is None else (self.member,)

    def shape(self, name: str, *, size: int = 0) -> TriedShape:
        """Return a tried shape of one of the budgets by its name."""
        return next(one for one in self.tried if one.name == name and one.size == size)

    def chosen_shape(self, size: int) -> TriedShape:
        """Return the shape chosen for a budget."""
        return self.shape(self.chosen[size].name, size=size)

    def axes(self, shape: TriedShape) -> tuple[str, ...]:
        """Return the axes that a shape is smaller in than the dense model: layers, mlp, heads, experts."""
        smaller = {
            "layers": shape.layers < self.dense_layers,
            "mlp": any(shape.widths[field] < width for field, width in self.dense_widths.items()),
            "heads": shape.kv_groups != self.dense_kv_groups,
            "experts": shape.experts != self.dense_experts,
        }
        return tuple(axis for axis, is_smaller in smaller.items() if is_smaller)

    @property
    def frontier(self) -> tuple[TriedShape, ...]:
        """Tried shapes, from the largest, that no shape of at most their size is better than; only those not broken.

        Once shapes were repaired, it has repaired shapes only: a shape as cut cannot be compared with them.
        """
        return frontier(comparable(self.tried))

    @property
    def speed_frontier(self) -> tuple[TriedShape, ...]:
        """Tried shapes, from the slowest, that no shape of at least their speed is better than, as ``frontier``."""
        timed = [one for one in comparable(self.tried) if one.speed is not None]
        return frontier(timed, cost=lambda one: -(one.speed or 0.0))


def comparable(shapes: Sequence[TriedShape]) -> tuple[TriedShape, ...]:
    """Return the repaired shapes; all of them where none was repaired."""
    return tuple(one for one in shapes if one.repaired) or tuple(shapes)


def frontier(
    shapes: Sequence[TriedShape], *, cost: Callable[[TriedShape], float] = lambda one: one.parameters
) -> tuple[TriedShape, ...]:
    """Return the shapes, from the largest cost, for which none of at most their cost has a lower score."""
    ordered = sorted((one for one in shapes if one.broken is None), key=lambda one: (cost(one), one.score))
    best: list[TriedShape] = []
    for one in ordered:  # from the smallest: a larger shape must be better than all before it
        if not best or one.score < best[-1].score:
            best.append(one)
    return tuple(reversed(best))
