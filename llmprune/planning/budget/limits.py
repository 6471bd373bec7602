"""Limits of a budget in absolute numbers, for each model of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmprune.common.errors import RecipeError
from llmprune.cut.shape import Shape
from llmprune.planning.budget.sizes import ShapeSizes
from llmprune.recipe.budget import Budget
from llmprune.results.sentences.search import describe_amount

# By name; ``speed`` is the least value, times the dense model's, every other one the largest.
Limits = Mapping[str, float]
SpeedOf = Callable[[Shape], float]  # generated tokens a second of a shape, times the dense model's


def amount(name: str, sizes: ShapeSizes, *, budget: Budget) -> float:
    """Return the amount of a shape that a limit is about; of every limit but ``speed``."""
    if name == "parameters":
        return sizes.parameters
    if name == "active_parameters":
        return sizes.active_parameters
    if name == "weights":
        return sizes.bytes if budget.weight_bits is None else sizes.parameters * budget.weight_bits / 8
    assert name == "kv_cache", f"{name} is no limit of a size"
    assert sizes.kv_bytes_per_token is not None, "a limit of a cache that is not counted is refused"
    return sizes.kv_bytes_per_token


def of_dense(name: str, value: float, *, dense: ShapeSizes, budget: Budget) -> str:
    """Return a limit or an amount in its unit, with its fraction of the dense model's."""
    if name == "speed":
        return describe_amount(name, value)
    return f"{describe_amount(name, value)} ({value / amount(name, dense, budget=budget):.3g} of the dense model's)"


def limits_of_members(budget: Budget, dense: ShapeSizes, *, has_experts: bool) -> tuple[Limits, ...]:
    """Return the limits for each model of the family, the largest first; of a single model where no limit is a list.

    Raises RecipeError for a limit that says nothing about this model, and where the dense model is small enough.
    """
    _require_counted(budget, dense, has_experts=has_experts)
    limits = {
        name: [_absolute(name, value, dense=dense, budget=budget) for value in values]
        for name, values in budget.limits.items()
    }
    family = budget.family
    single = {name: values[0] for name, values in limits.items() if name != family}
    if family is None:
        members: list[Limits] = [single]
    else:
        values = sorted(limits[family], reverse=family != "speed")
        if len(set(values)) < len(values):
            raise RecipeError(f"budget.{family}: two values are the same number for this model; name each size once")
        members = [{family: value, **single} for value in values]
    for member in members:
        _require_smaller(member, dense, budget=budget)
    return tuple(members)


def value_of_member(budget: Budget, limits: Limits, *, dense: ShapeSizes) -> float:
    """Return the value in the list of a family that a member's limits come from."""
    name = budget.family
    assert name is not None, "a family has one limit that is a list"
    return min(
        budget.limits[name],
        key=lambda value: abs(_absolute(name, value, dense=dense, budget=budget) - limits[name]),
    )


def _absolute(name: str, value: float, *, dense: ShapeSizes, budget: Budget) -> float:
    """Return a limit in absolute numbers; fractions are those of the dense model."""
    return value if name == "speed" or value >= 1 else value * amount(name, dense, budget=budget)


def idle_limits(limits: Limits, dense: ShapeSizes, *, budget: Budget) -> list[str]:
    """Return the names of the limits that the dense model meets."""
    return [name for name, value in limits.items() if name != "speed" and amount(name, dense, budget=budget) <= value]


def _require_counted(budget: Budget, dense: ShapeSizes, *, has_experts: bool) -> None:
    if budget.kv_cache is not None and not dense.kv_bytes_per_token:
        raise RecipeError(
            "budget.kv_cache: this model has no key-value cache that can be counted without its weights; remove the key"
        )
    if budget.active_parameters is not None and not has_experts:
        raise RecipeError(
            "budget.active_parameters: every token uses all parameters of this model, which has no experts that tokens "
            "are routed to; write budget.parameters"
        )


def _require_smaller(limits: Limits, dense: ShapeSizes, *, budget: Budget) -> None:
    idle = idle_limits(limits, dense, budget=budget)
    if len(idle) < len(limits):
        return
    problems = []
    for name in idle:
        had, asked = (describe_amount(name, one) for one in (amount(name, dense, budget=budget), limits[name]))
        problems.append(
            f"budget.{name}: the dense model, with {had}, meets {asked}, so there is nothing to cut; ask for less, "
            "such as 0.75"
        )
    raise RecipeError(problems)
