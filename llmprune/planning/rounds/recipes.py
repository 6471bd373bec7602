"""Recipes of the rounds of cut and training, each of which cuts what the round before left.

Each round goes an equal part of the way from the dense sizes to those asked for, and is scored anew (Han et al.,
arXiv 1506.02626). Zeros in N:M patterns come with the last round: such a pattern has no half-way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from llmprune.anatomy.types import Anatomy
from llmprune.common.errors import RecipeError
from llmprune.cut.layer_choice import layers_in_group, possible_counts
from llmprune.planning.notes.recovery import require_a_step
from llmprune.planning.sizes.planned_cut import planned_cut
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.planning.texts.self_generated import window_length
from llmprune.recipe.depth import Depth
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.experts import Experts
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.recover import Recover
from llmprune.recipe.sparsity import Sparsity
from llmprune.recipe.width import Width
from llmprune.recipe.width_rounding import width_step


def has_rounds(recipe: Recipe) -> bool:
    """Check that a recipe cuts in several rounds."""
    return recipe.recover is not None and recipe.recover.rounds > 1


def round_recipes(recipe: Recipe, anatomy: Anatomy) -> tuple[Recipe, ...]:
    """Return the recipe of each round, which cuts the result of the round before; all name the recipe's own model.

    Every round but the last evaluates perplexity alone: no round may be trained on that text. Raises RecipeError where
    a round would cut nothing, or train for less than a step.
    """
    recover = recipe.recover
    assert recover is not None, "without the section there is one round"
    way = _Way(recipe, recover, anatomy, planned_cut(recipe, anatomy))
    sizes = [way.dense()]
    for number in range(1, recover.rounds + 1):
        sizes.append(way.after(number, before=sizes[-1]))
    cutting = sum(before != after for before, after in pairwise(sizes))
    if cutting < recover.rounds:
        raise RecipeError(_too_many(recover.rounds, cutting=cutting))
    _require_steps(recipe, recover)
    own = recover.of_round
    against = {"against": recipe.reference.id, "against_revision": recipe.reference.revision}
    recipes = []
    for number, (before, after) in enumerate(pairwise(sizes), start=1):
        update = _Step(before, after).sections(recipe)
        update["recover"] = own.model_copy(update=against) if number > 1 else own
        if number < recover.rounds:
            update |= {"evaluation": Evaluation(generation=None, perplexity=recipe.evaluation.perplexity), "hub": None}
            update["export"] = recipe.export.model_copy(update={"gguf": (), "requantize": False})
            update["vocabulary"] = None  # all rounds share the dense model's tokens
        recipes.append(recipe.derived(update))
    return tuple(recipes)


@dataclass(frozen=True)
class _Sizes:
    """Sum of the cuts of the first rounds. ``named``: indices of removed layers that the recipe names."""

    removed: int = 0
    named: tuple[int, ...] = ()
    widths: dict[str, int] = field(default_factory=dict)  # neurons kept, by config field
    kv_groups: int | None = None
    experts: int | None = None
    zeros: float = 0.0  # share of the weights, without a pattern of groups
    groups: bool = False  # True once the pattern of groups is there


@dataclass(frozen=True)
class _Way:
    """The way from the dense sizes to those that a recipe asks for. ``planned``: what all rounds together keep."""

    recipe: Recipe
    recover: Recover
    anatomy: Anatomy
    planned: PlannedCut

    def dense(self) -> _Sizes:
        """Return the sizes before the first round."""
        anatomy = self.anatomy
        return _Sizes(
            widths={name: anatomy.widths[name] for name in self.planned.widths.kept},
            kv_groups=anatomy.heads.count if anatomy.heads else None,
            experts=anatomy.experts.count if anatomy.experts else None,
        )

    def after(self, number: int, *, before: _Sizes) -> _Sizes:
        """Return the sizes after a round. ``number``: counts from 1."""
        dense, part = self.anatomy, number / self.recover.rounds
        layers = _between(dense.num_layers, len(self.planned.layers), part=part, possible=self._possible_layers())
        removed = max(dense.num_layers - layers, before.removed)
        kept, heads, experts = self.planned.widths.kept, self.planned.heads.kv_groups, self.planned.experts
        if dense.heads and heads is not None:
            heads = _between(dense.heads.count, heads, part=part, possible=(*dense.heads.possible, dense.heads.count))
        if dense.experts and experts is not None:
            possible = [one for one in dense.experts.possible if one >= experts]
            experts = _between(dense.experts.count, experts, part=part, possible=possible)
        sparsity = self.recipe.sparsity
        by_share = sparsity is not None and sparsity.parsed.of is None
        return _Sizes(
            removed=removed,
            named=tuple(sorted(self._order_of_named()[:removed])),
            widths={name: self._width(name, goal, part=part, most=before.widths[name]) for name, goal in kept.items()},
            kv_groups=heads,
            experts=experts,
            zeros=sparsity.parsed.share * part if sparsity and by_share else 0.0,
            groups=sparsity is not None and not by_share and number == self.recover.rounds,
        )

    def _width(self, name: str, goal: int, *, part: float, most: int) -> int:
        """Return a width from which ``goal`` is still a multiple of ``width_step``."""
        dense = self.anatomy.widths[name]
        multiple = self.recipe.width.multiple if self.recipe.width else "auto"
        step = width_step(dense, multiple)
        fitting = [width for width in range(goal, most + 1, step) if goal % width_step(width, multiple) == 0]
        wanted = dense + (goal - dense) * part
        return min({*fitting, goal, most}, key=lambda width: (abs(width - wanted), width))

    def _possible_layers(self) -> Sequence[int]:
        depth, whole, goal = self.recipe.depth, self.anatomy.num_layers, len(self.planned.layers)
        possible = possible_counts(self.anatomy, keep_pattern=depth is not None and depth.keep_pattern)
        group = layers_in_group(self.anatomy)
        return [one for one in possible if one == goal or (whole - one) % group == 0]

    def _order_of_named(self) -> list[int]:
        """Return the layers that the recipe names, in the order of their removal, so that each round takes from all."""
        depth, rounds = self.recipe.depth, self.recover.rounds
        if depth is None or depth.layers is None:
            return []
        if depth.keep_pattern or self.anatomy.by_index:
            key, what = ("depth.layers with depth.keep_pattern", "preserve the pattern")
            if not depth.keep_pattern:
                key, what = "depth.layers", "leave each other layer at an index of its kind"
            raise RecipeError(
                f"recover.rounds: {key} names layers that only together {what}; give depth.remove and let the scores "
                "choose, or one round"
            )
        named = sorted(depth.layers)
        return [index for first in range(rounds) for index in named[first::rounds]]


def _between(dense: int, goal: int, *, part: float, possible: Sequence[int]) -> int:
    """Return the possible number nearest to ``part`` of the way from ``dense`` to ``goal``."""
    wanted = dense + (goal - dense) * part
    return min((one for one in possible if goal <= one <= dense), key=lambda one: (abs(one - wanted), one))


@dataclass(frozen=True)
class _Step:
    """One round: sizes before and after it."""

    before: _Sizes
    after: _Sizes

    def sections(self, recipe: Recipe) -> dict[str, Any]:
        """Return the sections of the recipe that make the cut, without those that cut nothing in this round."""
        return {
            "depth": recipe.depth and self._depth(recipe.depth),
            "width": recipe.width and self._width(recipe.width),
            "experts": recipe.experts and self._experts(recipe.experts),
            "sparsity": recipe.sparsity and self._sparsity(recipe.sparsity),
            "budget": None,  # its shape is chosen, and stands in the sections above
        }

    def _depth(self, depth: Depth) -> Depth | None:
        gone, number = self.before.named, self.after.removed - self.before.removed
        if not number:
            return None
        if depth.layers is None:
            return depth.model_copy(update={"remove": number, "keep": None})
        named = [index for index in self.after.named if index not in gone]
        return depth.model_copy(update={"layers": tuple(index - sum(one < index for one in gone) for index in named)})

    def _width(self, width: Width) -> Width | None:
        before, after = self.before, self.after
        neurons = {name: kept for name, kept in after.widths.items() if kept < before.widths[name]} or None
        heads = after.kv_groups if after.kv_groups != before.kv_groups else None
        if neurons is None and heads is None:
            return None
        return width.model_copy(update={"mlp": None, "neurons": neurons, "heads": heads})

    def _experts(self, experts: Experts) -> Experts | None:
        if self.after.experts == self.before.experts:
            return None
        return experts.model_copy(update={"remove": None, "keep": self.after.experts})

    def _sparsity(self, sparsity: Sparsity) -> Sparsity | None:
        if self.after.groups:
            return sparsity
        return sparsity.model_copy(update={"pattern": self.after.zeros}) if self.after.zeros else None


def _too_many(rounds: int, *, cutting: int) -> str:
    if not cutting:
        return (
            "recover.rounds: nothing is cut, so that there is nothing to divide into rounds; name what to remove in "
            "depth, width, experts or sparsity, or remove the key"
        )
    return (
        f"recover.rounds: {rounds} rounds, of which only {cutting} would remove anything, because sizes are whole "
        f"numbers; set recover.rounds to {cutting}, or remove more"
    )


def _require_steps(recipe: Recipe, recover: Recover) -> None:
    """Raise RecipeError where the tokens of one round are fewer than those of one optimiser step."""
    try:
        require_a_step(recover.of_round, length=window_length(recipe))
    except RecipeError as error:
        raise RecipeError([f"{one} (for each of the {recover.rounds} rounds)" for one in error.problems]) from None
