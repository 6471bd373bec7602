"""What a recipe asks for: how many layers, neurons, heads and experts before the scores are known, which ones after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.anatomy.types import NO_HEADS, Anatomy, Heads
from llmprune.common.errors import RecipeError
from llmprune.cut.decision import round_width, width_step
from llmprune.cut.layer_choice import choose_in_pattern, first_break, possible_counts
from llmprune.recipe.depth import Depth
from llmprune.recipe.experts import Experts
from llmprune.recipe.width import Width
from llmprune.results.formatting import ranges


def planned_layers(depth: Depth | None, anatomy: Anatomy) -> tuple[int, ...]:
    """Layers kept; where the scores will decide, as many of them, without the middle."""
    count = anatomy.num_layers
    if depth is None:
        return tuple(range(count))
    if depth.layers is not None:
        number = len(depth.layers)
        outside = [index for index in depth.layers if index >= count]
        if outside:
            raise RecipeError(f"depth.layers: the model has layers 0 to {count - 1}, not {outside}; correct the list")
        removed = set(depth.layers)
        if depth.keep_pattern and number < count:
            _require_pattern([index for index in range(count) if index not in removed], anatomy)
    else:
        number = depth.remove if depth.remove is not None else count - (depth.keep or 0)
        if number < 0:
            raise RecipeError(
                f"depth.keep: the model has {count} layers, {depth.keep} cannot be kept; keep at most {count}"
            )
        removed = set(_spread(count, number, one_of=anatomy.one_of))
    if number >= count:
        raise RecipeError(
            f"depth.{'layers' if depth.layers else 'remove'}: the model has {count} layers and "
            f"{number} would go; at least one must stay: remove at most {count - 1}"
        )
    if number and anatomy.depth_refusal:
        raise RecipeError(f"depth: no layer of this model can go: {anatomy.depth_refusal}; remove the section")
    if depth.keep_pattern and depth.layers is None:
        _require_possible(count - number, anatomy)
        return choose_in_pattern(_far_from_the_middle(count), count - number, anatomy=anatomy)
    return tuple(index for index in range(count) if index not in removed)


def _far_from_the_middle(count: int) -> Tensor:
    """Score layers by their distance from the middle, where layers go first."""
    return (torch.arange(count) - count // 2).abs().double()


def _require_possible(kept: int, anatomy: Anatomy) -> None:
    possible = possible_counts(anatomy)
    if kept not in possible:
        raise RecipeError(
            f"depth.keep_pattern: of the first {kept} of {anatomy.num_layers} layers none is of full attention, and "
            f"one must stay; keep {ranges(possible)} layers, or leave depth.keep_pattern out"
        )


def _require_pattern(keep: Sequence[int], anatomy: Anatomy) -> None:
    for pattern in anatomy.patterns:
        new = first_break(pattern, keep)
        if new is not None:
            raise RecipeError(
                f"depth.keep_pattern: without depth.layers layer {keep[new]} would become layer {new}, which is "
                f"{pattern.kinds[keep[new]]} where {pattern.name} repeats every {pattern.period} layers and says "
                f"{pattern.kinds[new]}; name other layers, or give depth.remove and let the scores choose"
            )


def _spread(count: int, number: int, *, one_of: tuple[int, ...]) -> list[int]:
    """Some ``number`` of layers, from the middle outwards, the first of ``one_of`` left out."""
    free = [index for index in range(count) if index not in one_of[:1]]
    outwards = sorted(free, key=lambda index: abs(index - count // 2))
    return outwards[:number]


def planned_widths(width: Width | None, anatomy: Anatomy, *, notes: list[str]) -> dict[str, int]:
    """Neurons kept by config field, rounded to what hardware likes, with a note where that changes it."""
    if width is None or not width.cuts_mlp:
        return {}
    widths = anatomy.widths
    if not widths:
        raise RecipeError(
            f"width: the MLPs of this model cannot be narrowed: {anatomy.width_refusal}; "
            f"remove {'width.mlp' if width.mlp is not None else 'width.neurons'}"
        )
    if width.mlp is not None:
        wanted: dict[str, float] = {field: width.mlp * dense for field, dense in widths.items()}
        notes += [f"{group.field} stays as it is: {group.refusal}" for group in anatomy.groups if group.refusal]
    else:
        wanted = dict(_named_widths(width, anatomy))
    kept = {field: round_width(value, widths[field]) for field, value in wanted.items()}
    for field, value in wanted.items():
        if abs(kept[field] - value) >= 1 and kept[field] < widths[field]:  # else rounding.py says more
            notes.append(
                f"MLP width {value:g} is rounded to {kept[field]}, a multiple of {width_step(widths[field])} "
                f"({kept[field] / widths[field]:.1%} of {widths[field]}, {field})"
            )
    _refuse_unscorable(width, {field for field in kept if kept[field] < widths[field]}, anatomy=anatomy)
    return kept


def _refuse_unscorable(width: Width, fields: set[str], *, anatomy: Anatomy) -> None:
    criterion = width.neurons_by
    routed = sorted({unit.field for units in anatomy.units for unit in units if not unit.refit} & fields)
    if routed and criterion.routed_refusal:
        others = ", ".join(field for field in anatomy.widths if field not in routed)
        remedy = f"name another width in width.neurons ({others}) or choose" if others else "choose"
        raise RecipeError(
            f"width.criterion: {criterion.kind} cannot score the neurons of {', '.join(routed)}: "
            f"{criterion.routed_refusal}; {remedy} another kind, such as activation"
        )


def _named_widths(width: Width, anatomy: Anatomy) -> dict[str, int]:
    """The numbers of neurons that the recipe names, by config field."""
    widths, neurons = anatomy.widths, width.neurons
    listed = ", ".join(f"{field} ({dense})" for field, dense in widths.items())
    if isinstance(neurons, int):
        if len(widths) > 1:
            raise RecipeError(
                f"width.neurons: {neurons} is one number and this model has several widths: {listed}; "
                f"name each that is cut, such as {{{next(iter(widths))}: {neurons}}}, or give the fraction width.mlp"
            )
        neurons = {next(iter(widths)): neurons}
    problems = []
    for field, number in (neurons or {}).items():
        refused = next((group.refusal for group in anatomy.groups if group.field == field and group.refusal), None)
        if field not in widths:
            problems.append(
                f"width.neurons.{field}: {refused or 'is no width of this model'}; those that are: {listed}"
            )
        elif number > widths[field]:
            problems.append(
                f"width.neurons: {number} is more than the {widths[field]} neurons that the MLPs have ({field}); "
                "keep at most those"
            )
    if problems:
        raise RecipeError(problems)
    return neurons or {}


def planned_heads(width: Width | None, anatomy: Anatomy, *, notes: list[str]) -> int | None:
    """Key-value groups of heads kept in each layer; None where the model has no heads that are counted.

    A fraction takes the nearest number that the config accepts, with a note where that is another.
    """
    found = anatomy.heads
    if width is None or width.heads is None:
        return found.count if found else None
    if found is None or found.refusal:
        reason = found.refusal if found else NO_HEADS
        raise RecipeError(f"width.heads: no attention heads of this model can be removed: {reason}; remove the key")
    accepted = (*found.possible, found.count)
    if isinstance(width.heads, int):
        if width.heads not in accepted:
            raise RecipeError(_heads_problem(width.heads, found))
        return width.heads
    wanted = width.heads * found.count
    kept = min(accepted, key=lambda groups: (abs(groups - wanted), -groups))
    if abs(kept - wanted) >= 0.5 and kept < found.count:  # else rounding.py says more
        notes.append(
            f"{wanted:g} of {found.count} key-value groups of heads is made {kept}: its config accepts "
            f"{ranges(accepted)}"
        )
    return kept


def _heads_problem(groups: int, found: Heads) -> str:
    said = f"width.heads: {groups} is more than the {found.count} key-value groups that the attention has"
    if groups < found.count:
        fields = " and ".join(f"{name} {value}" for name, value in found.fields(groups).items())
        said = f"width.heads: {groups} of {found.count} key-value groups cannot be kept, its config refuses {fields}"
    return f"{said}; keep {ranges((*found.possible, found.count))}"


def planned_experts(experts: Experts | None, anatomy: Anatomy) -> int | None:
    """Experts kept in each mixture; None where the recipe leaves them or the model has none."""
    found = anatomy.experts
    if experts is None:
        return found.count if found else None
    if found is None or found.refusal:
        reason = found.refusal if found else "it has no mixture of experts"
        raise RecipeError(f"experts: none can be removed from this model: {reason}; remove the section")
    kept = experts.keep if experts.keep is not None else found.count - (experts.remove or 0)
    least = max(found.top_k or 1, 1)
    if not least <= kept <= found.count:
        key, possible = "remove" if experts.keep is None else "keep", ranges(range(least, found.count + 1))
        said = f"{kept} of {found.count} experts would stay and each token takes {least}"
        raise RecipeError(f"experts.{key}: {said}; keep {possible}")
    return kept
