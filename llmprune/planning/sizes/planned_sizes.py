"""Turn the sizes that a recipe asks for into numbers of neurons, heads and experts to keep.

Everything here is known before the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.types import NO_HEADS, Anatomy, Heads
from llmprune.common.errors import RecipeError
from llmprune.criteria.base import WidthCriterion
from llmprune.planning.sizes.planned_hidden import ALL_CHANNELS, PlannedHidden
from llmprune.recipe.experts import Experts
from llmprune.recipe.width import Width
from llmprune.recipe.width_rounding import round_width, width_step
from llmprune.results.formatting import ranges


@dataclass(frozen=True)
class PlannedWidths:
    """Neurons kept, by config field, and notes on rounding and on widths that cannot be cut."""

    kept: dict[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedHeads:
    """Key-value groups kept in each layer, None for a model without counted heads; and notes on the rounding."""

    kv_groups: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedCut:
    """The parts of a model that a recipe keeps: indices of layers, and the number of units of every other kind."""

    layers: tuple[int, ...]
    widths: PlannedWidths
    experts: int | None
    heads: PlannedHeads
    hidden: PlannedHidden = ALL_CHANNELS

    @property
    def sizes(self) -> KeptSizes:
        """Sizes of the pruned model."""
        return KeptSizes(self.layers, self.widths.kept, self.experts, self.heads.kv_groups, self.hidden.size)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on all parts."""
        return self.widths.notes + self.heads.notes + self.hidden.notes


def planned_widths(width: Width | None, anatomy: Anatomy) -> PlannedWidths:
    """Return the neurons to keep, rounded to multiples of ``width_step``.

    Raises RecipeError where the model or the criterion does not allow them.
    """
    if width is None or not width.cuts_mlp:
        return PlannedWidths({})
    widths = anatomy.widths
    if not widths:
        raise RecipeError(
            f"width: the MLPs of this model cannot be narrowed: {anatomy.width_refusal}; "
            f"remove {'width.mlp' if width.mlp is not None else 'width.neurons'}"
        )
    notes: list[str] = []
    if width.mlp is not None:
        wanted: dict[str, float] = {field: width.mlp * dense for field, dense in widths.items()}
        notes += [f"{group.field} is not cut: {group.refusal}" for group in anatomy.groups if group.refusal]
    else:
        wanted = dict(_named_widths(width, anatomy))
    kept = {field: round_width(value, widths[field], multiple=width.multiple) for field, value in wanted.items()}
    for field, value in wanted.items():
        # a width that is rounded to the dense one is reported by settings_without_effect
        if abs(kept[field] - value) >= 1 and kept[field] < widths[field]:
            notes.append(
                f"MLP width {value:g} is rounded to {kept[field]}, a multiple of "
                f"{width_step(widths[field], width.multiple)} "
                f"({kept[field] / widths[field]:.1%} of {widths[field]}, {field})"
            )
    _require_scorable(width, {field for field in kept if kept[field] < widths[field]}, anatomy=anatomy)
    return PlannedWidths(kept, tuple(notes))


def _require_scorable(width: Width, fields: set[str], *, anatomy: Anatomy) -> None:
    criterion = width.neuron_criterion
    routed = unscorable_fields(criterion, fields, anatomy=anatomy)
    if routed:
        others = ", ".join(field for field in anatomy.widths if field not in routed)
        remedy = f"name another width in width.neurons ({others}) or choose" if others else "choose"
        raise RecipeError(
            f"width.criterion: {criterion.kind} cannot score the neurons of {', '.join(routed)}: "
            f"{criterion.routed_refusal}; {remedy} another kind, such as activation"
        )


def unscorable_fields(criterion: WidthCriterion, fields: set[str], *, anatomy: Anatomy) -> list[str]:
    """Return those of some widths whose neurons belong to routed experts, which a criterion cannot score."""
    if criterion.routed_refusal is None:
        return []
    return sorted({unit.field for units in anatomy.units for unit in units if not unit.refit} & fields)


def _named_widths(width: Width, anatomy: Anatomy) -> dict[str, int]:
    """Return the numbers of neurons that the recipe names, by config field."""
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
                f"width.neurons.{field}: {refused or 'is not a width of this model'}; its widths are: {listed}"
            )
        elif number > widths[field]:
            problems.append(
                f"width.neurons: {number} is more than the {widths[field]} neurons that the MLPs have ({field}); "
                f"keep at most {widths[field]}"
            )
    if problems:
        raise RecipeError(problems)
    return neurons or {}


def planned_heads(width: Width | None, anatomy: Anatomy) -> PlannedHeads:
    """Return the key-value groups to keep in each layer.

    A fraction is rounded to the nearest number that the model's config accepts. Raises RecipeError for a number that
    it does not accept, and for a model whose heads cannot be removed.
    """
    found = anatomy.heads
    if width is None or width.heads is None:
        return PlannedHeads(found.count if found else None)
    if found is None or found.refusal:
        reason = found.refusal if found else NO_HEADS
        raise RecipeError(f"width.heads: no attention heads of this model can be removed: {reason}; remove the key")
    accepted = (*found.possible, found.count)
    if isinstance(width.heads, int):
        if width.heads not in accepted:
            raise RecipeError(_heads_problem(width.heads, found))
        return PlannedHeads(width.heads)
    wanted = width.heads * found.count
    kept = min(accepted, key=lambda groups: (abs(groups - wanted), -groups))
    # a number that is rounded to the dense one is reported by settings_without_effect
    if abs(kept - wanted) >= 0.5 and kept < found.count:
        note = f"{wanted:g} of {found.count} key-value groups is rounded to {kept}: the config accepts"
        return PlannedHeads(kept, (f"{note} {ranges(accepted)}",))
    return PlannedHeads(kept)


def _heads_problem(groups: int, found: Heads) -> str:
    problem = f"width.heads: {groups} is more than the {found.count} key-value groups that the attention has"
    if groups < found.count:
        fields = " and ".join(f"{name} {value}" for name, value in found.fields(groups).items())
        problem = f"width.heads: {groups} of {found.count} key-value groups cannot be kept, the config refuses {fields}"
    return f"{problem}; keep {ranges((*found.possible, found.count))}"


def planned_experts(experts: Experts | None, anatomy: Anatomy) -> int | None:
    """Return the experts to keep in each mixture; None for a model without a mixture.

    Raises RecipeError where none can be removed, or where fewer would be left than a token is routed to.
    """
    found = anatomy.experts
    if experts is None:
        return found.count if found else None
    if found is None or found.refusal:
        reason = found.refusal if found else "it has no mixture of experts"
        raise RecipeError(f"experts: none can be removed from this model: {reason}; remove the section")
    kept = experts.keep if experts.keep is not None else found.count - (experts.remove or 0)
    if kept not in found.possible:
        key = "remove" if experts.keep is None else "keep"
        problem = f"{kept} of {found.count} experts would be kept, and each token is routed to {found.top_k or 1}"
        if found.groups > 1:
            problem += f" in {found.groups} groups, which lose equal numbers"
        raise RecipeError(f"experts.{key}: {problem}; keep {ranges(found.possible)}")
    return kept
