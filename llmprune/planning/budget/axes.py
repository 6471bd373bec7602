"""The axes of a search: the numbers of layers, neurons, key-value groups and experts that shapes may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmprune.anatomy.types import NO_HEADS
from llmprune.common.errors import RecipeError
from llmprune.cut.layer_choice import layers_in_group, possible_counts
from llmprune.planning.budget.sizes import ShapeCounter
from llmprune.planning.sizes.planned_sizes import unscorable_fields
from llmprune.recipe.budget import Axes, ExpertsAxis, HeadsAxis, LayersAxis, MlpAxis
from llmprune.recipe.width_rounding import K_QUANT_ROW, round_width, width_step
from llmprune.results.formatting import ranges

_LEAST_MULTIPLE = 32
_LARGEST_STEP = 0.01  # of the parameters, above which a multiple is halved
_LARGEST_K_QUANT_STEP = 0.03  # for multiples of 256: the default tolerance of a budget, so that some shape meets it
_MOST_EXPERT_STEPS = 16  # numbers of experts between the dense one and none

Widths = tuple[tuple[str, int], ...]  # of all fields, sorted by field


@dataclass(frozen=True)
class AxisValues:
    """The values of each axis, beginning with the dense one, which is the only one of an axis that cannot be cut."""

    layers: tuple[int, ...]
    widths: tuple[Widths, ...]
    kv_groups: tuple[int | None, ...]
    experts: tuple[int | None, ...]


def axis_values(axes: Axes | None, counter: ShapeCounter) -> AxisValues:
    """Return the values of the axes that a recipe names, or of all that the model has.

    Raises RecipeError for a named axis that cannot be cut, with the anatomy's reason, and where none can.
    """
    finder = _Finder(axes, counter)
    found = AxisValues(
        layers=finder.layers(),
        widths=finder.widths(),
        kv_groups=finder.kv_groups(),
        experts=finder.experts(),
    )
    if finder.problems:
        raise RecipeError(finder.problems)
    if all(len(values) == 1 for values in (found.layers, found.widths, found.kv_groups, found.experts)):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in finder.refusals.items())
        raise RecipeError(f"budget: nothing can be removed from this model: {reasons}")
    return found


class _Finder:
    """The search for the values of each axis. ``problems``: with named axes; ``refusals``: reasons by axis."""

    def __init__(self, axes: Axes | None, counter: ShapeCounter) -> None:
        self._axes, self._counter, self._dense = axes, counter, counter.dense
        self._anatomy = counter.anatomy
        self.problems: list[str] = []
        self.refusals: dict[str, str] = {}

    def layers(self) -> tuple[int, ...]:
        """Return the numbers of layers that can keep the patterns of layers, and that whole groups leave."""
        count = self._anatomy.num_layers
        axis = LayersAxis() if self._axes is None else self._axes.layers
        if axis is None or self._refused("layers", self._anatomy.depth_refusal):
            return (count,)
        least = -(-count // 2) if axis.at_least is None else axis.at_least
        group = layers_in_group(self._anatomy)
        counts = possible_counts(self._anatomy, keep_pattern=True)
        possible = [one for one in counts if (count - one) % group == 0]
        values = tuple(one for one in reversed(possible) if least <= one < count)
        self._require_some("layers", values, kept=f"{least} of {count} layers", possible=possible[:-1])
        return (count, *values)

    def kv_groups(self) -> tuple[int | None, ...]:
        """Return the numbers of key-value groups."""
        heads, dense = self._anatomy.heads, self._dense.kv_groups
        axis = HeadsAxis() if self._axes is None else self._axes.heads
        if axis is None or self._refused("heads", NO_HEADS if heads is None else heads.refusal):
            return (dense,)
        assert heads is not None, "a model without heads is refused"
        least = -(-heads.count // 2) if axis.at_least is None else axis.at_least
        values = tuple(one for one in sorted(heads.possible, reverse=True) if one >= least)
        self._require_some("heads", values, kept=f"{least} of {heads.count} key-value groups", possible=heads.possible)
        return (dense, *values)

    def experts(self) -> tuple[int | None, ...]:
        """Return the numbers of experts, in steps of a sixteenth of them where there are many."""
        experts, dense = self._anatomy.experts, self._dense.experts
        axis = ExpertsAxis() if self._axes is None else self._axes.experts
        none = "it has no mixture of experts"
        if axis is None or self._refused("experts", none if experts is None else experts.refusal):
            return (dense,)
        assert experts is not None, "a model without experts is refused"
        count, possible = experts.count, experts.possible
        least = max(-(-count // 2) if axis.at_least is None else axis.at_least, experts.fewest)
        step = -(-max(count // _MOST_EXPERT_STEPS, 1) // experts.groups) * experts.groups
        values = tuple(range(count - step, least - 1, -step))
        self._require_some("experts", values, kept=f"{least} of {count} experts", possible=possible[:-1])
        return (dense, *values)

    def widths(self) -> tuple[Widths, ...]:
        """Return the widths of all fields: the same fraction of each, in multiples that matrix kernels run fast at."""
        dense, anatomy = self._dense.widths, self._anatomy
        axis = MlpAxis() if self._axes is None else self._axes.mlp
        if axis is None or self._refused("mlp", anatomy.width_refusal):
            return (dense,)
        routed = unscorable_fields(axis.criterion, set(anatomy.widths), anatomy=anatomy)
        if routed:
            self.problems.append(
                f"budget.axes.mlp.criterion: {axis.criterion.kind} cannot score the neurons of {', '.join(routed)}: "
                f"{axis.criterion.routed_refusal}; choose another kind, such as activation"
            )
            return (dense,)
        values = self._narrower(axis)
        widest = max(anatomy.widths.values())
        kept = f"{100 * axis.at_least:g}% of {widest} neurons in multiples of {self._multiple(axis)}"
        self._require_some("mlp", values, kept=kept, keys="at_least or multiple")
        return (dense, *values)

    def _narrower(self, axis: MlpAxis) -> tuple[Widths, ...]:
        """Return the widths below the dense ones; the widest field sets the steps."""
        fields = self._anatomy.widths
        name, widest = max(fields.items(), key=lambda item: item[1])
        step, stated = self._multiple(axis), axis.multiple != "auto"
        found: list[Widths] = []
        for width in range((widest - 1) // step * step, 0, -step):
            if width < axis.at_least * widest:
                break
            others = {
                other: round_width(
                    width / widest * dense, dense, multiple=step if stated else min(step, width_step(dense))
                )
                for other, dense in fields.items()
            }
            found.append(tuple(sorted({**others, name: width}.items())))
        return tuple(found)

    def _multiple(self, axis: MlpAxis) -> int:
        """Return the step of the widest field: as the recipe says, or one that is fine enough for the model."""
        if axis.multiple != "auto":
            return axis.multiple
        dense, widest = self._dense, max(self._anatomy.widths.values())
        without = replace(dense, widths=tuple((name, 0) for name, _ in dense.widths))
        whole = self._counter.sizes(dense).parameters
        neurons, step = whole - self._counter.sizes(without).parameters, width_step(widest)
        share = neurons / widest / whole  # of a neuron in all layers
        if step == K_QUANT_ROW and step * share <= _LARGEST_K_QUANT_STEP:
            return step
        while step > _LEAST_MULTIPLE and step * share > _LARGEST_STEP:
            step //= 2
        return step

    def _refused(self, name: str, reason: str | None) -> bool:
        """Note an axis that cannot be cut, with the reason; a problem if the recipe names it."""
        if reason is not None:
            self.refusals[name] = reason
            if self._axes is not None:
                self.problems.append(f"budget.axes.{name}: this model cannot give it: {reason}; remove the axis")
        return reason is not None

    def _require_some(
        self,
        name: str,
        values: Sequence[object],
        *,
        kept: str,
        possible: Sequence[int] = (),
        keys: str = "at_least",
    ) -> None:
        """Note an axis without a smaller value; a problem if the recipe names it. ``keys``: its bounds."""
        if values:
            return
        remedy = f"; possible: {ranges(possible)}" if possible else ""
        self.refusals[name] = f"at least {kept} are kept"
        if self._axes is not None:
            self.problems.append(
                f"budget.axes.{name}: at least {kept} are kept, so that nothing can be removed; lower {keys}, or "
                f"remove the axis{remedy}"
            )
