"""The space of shapes that a budget's axes span, and the limits of each model of its family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from llmprune.anatomy.types import Anatomy
from llmprune.cut.shape import Shape
from llmprune.planning.base import Base
from llmprune.planning.budget.axes import AxisValues, axis_values
from llmprune.planning.budget.limits import Limits, limits_of_members
from llmprune.planning.budget.sizes import ShapeCounter, ShapeSizes
from llmprune.planning.vocabulary.plan import stated_number, token_sizes
from llmprune.recipe.budget import Budget
from llmprune.recipe.recipe import Recipe

AXES = ("layers", "mlp", "heads", "experts")
Place = tuple[int, int, int, int]  # steps from the dense model along each axis


@dataclass(frozen=True)
class SearchSpace:
    """All shapes that the axes of a budget span. ``members``: limits of each model of the family, the largest first.

    ``tokens``: number that the vocabulary of every shape keeps; None if all are, and until they are counted.
    """

    budget: Budget
    counter: ShapeCounter
    values: AxisValues
    members: tuple[Limits, ...]
    tokens: int | None = None

    @property
    def anatomy(self) -> Anatomy:
        """Anatomy of the dense model."""
        return self.counter.anatomy

    @property
    def lengths(self) -> Place:
        """Number of values of each axis."""
        values = self.values
        return len(values.layers), len(values.widths), len(values.kv_groups), len(values.experts)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that can give."""
        return tuple(name for name, length in zip(AXES, self.lengths, strict=True) if length > 1)

    @cached_property
    def dense(self) -> Shape:
        """Shape of the dense model."""
        return self.counter.dense

    @cached_property
    def largest(self) -> Shape:
        """Shape that loses no more than tokens."""
        return self.shape((0, 0, 0, 0))

    @cached_property
    def smallest(self) -> Shape:
        """Shape with the smallest value of every axis."""
        layers, widths, groups, experts = self.lengths
        return self.shape((layers - 1, widths - 1, groups - 1, experts - 1))

    @cached_property
    def dense_sizes(self) -> ShapeSizes:
        """Sizes of the dense model."""
        return self.counter.sizes(self.dense)

    def shape(self, place: Place) -> Shape:
        """Return the shape at a place."""
        values, (layers, widths, groups, experts) = self.values, place
        sizes = values.layers[layers], values.widths[widths], values.kv_groups[groups], values.experts[experts]
        return Shape(*sizes, tokens=self.tokens)

    def place(self, shape: Shape) -> Place:
        """Return the place of a shape of this space."""
        values = self.values
        return (
            values.layers.index(shape.layers),
            values.widths.index(shape.widths),
            values.kv_groups.index(shape.kv_groups),
            values.experts.index(shape.experts),
        )

    def rows(self) -> Iterator[list[Place]]:
        """Yield rows of places, each from the largest along the axis with most values, to bisect them."""
        lengths = self.lengths
        longest = lengths.index(max(lengths))
        others = [range(length) if axis != longest else range(1) for axis, length in enumerate(lengths)]
        for layers, widths, groups, experts in product(*others):
            start = (layers, widths, groups, experts)
            yield [moved(start, longest, steps=steps) for steps in range(lengths[longest])]


def moved(place: Place, axis: int, *, steps: int) -> Place:
    """Return the place ``steps`` further from the dense model along an axis; nearer to it where they are negative."""
    layers, widths, groups, experts = (one + steps * (index == axis) for index, one in enumerate(place))
    return layers, widths, groups, experts


def search_space(recipe: Recipe, base: Base, *, tokens: int | None = None) -> SearchSpace:
    """Return the shapes and limits of a recipe's budget.

    ``tokens``: number that the recipe's vocabulary keeps, once it is counted. Raises ModelError where the vocabulary
    cannot be cut, RecipeError for an axis that the model cannot give, for a limit that says nothing about this model,
    and where there is nothing to cut.
    """
    assert recipe.budget is not None, "a search has a budget"
    trust = recipe.model.trust_remote_code
    token = token_sizes(base.dense, stored=base.names.dtypes, trust_remote_code=trust) if recipe.vocabulary else None
    if token is not None and tokens is None:
        tokens = stated_number(recipe, token.tokens)
    return spanned(recipe.budget, ShapeCounter(base, token=token, trust_remote_code=trust), tokens=tokens)


def spanned(budget: Budget, counter: ShapeCounter, *, tokens: int | None = None) -> SearchSpace:
    """Return the shapes and limits of a budget for the model of a counter, as ``search_space``."""
    experts = counter.anatomy.experts
    has_experts = experts is not None and experts.top_k is not None and experts.top_k < experts.count
    members = limits_of_members(budget, counter.sizes(counter.dense), has_experts=has_experts)
    return SearchSpace(budget, counter, axis_values(budget.axes, counter), members, tokens)
