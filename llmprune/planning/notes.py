"""Sentences of a plan: what a run leaves as it is, what a choice costs, and what it assumes."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import Config, find_layers, text_config
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.prediction_heads import about_heads
from llmprune.common.errors import RecipeError
from llmprune.common.schema import format_size
from llmprune.planning.interop import about_depth
from llmprune.planning.memory import neurons_of_solved_ups
from llmprune.planning.sparsity import SparsityPlan
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import Refit
from llmprune.recipe.text_source import PACKAGE_SCHEME
from llmprune.results.formatting import plural, ranges


def about_base(recipe: Recipe, config: Config) -> list[str]:
    """Say which parts of the model are not pruned, and whose code runs."""
    notes = []
    if text_config(config) is not config:
        notes.append("only the text part is pruned, and scored on text: what images need of it is not measured")
    notes += about_heads(config)
    if recipe.model.trust_remote_code:
        notes.append("the model's own Python code is run (model.trust_remote_code)")
    return notes


def about_sparsity(sparsity: SparsityPlan | None, pruned: PreTrainedModel) -> list[str]:
    """Name the matrices that stay dense."""
    if sparsity is None:
        return []
    return [f"stays dense: {said}" for said in sparsity.skipped] + _experts_stay_dense(pruned)


def about_refit(recipe: Recipe, anatomy: Anatomy, *, widths: dict[str, int]) -> list[str]:
    """Say what the refit leaves out and what it costs. Raises RecipeError for an up refit that solves nothing."""
    if recipe.refit is None:
        return []
    samples = recipe.calibration.shape()[0]
    cuts = recipe.depth or recipe.width or recipe.experts
    notes = _not_refit(anatomy) if cuts else []
    if cuts or (recipe.sparsity and recipe.sparsity.method.refits):
        notes += _unjudged(recipe.refit, samples)
    if recipe.refit.up:
        notes += _about_up(anatomy, widths, samples=samples)
    return notes


def about_scores(recipe: Recipe, anatomy: Anatomy, *, keep: Sequence[int]) -> list[str]:
    """Say what the criteria cost and assume, and what becomes of the layers' pattern."""
    notes = []
    if recipe.depth:
        if recipe.depth.layers is None:
            notes += _about_ablation(recipe, anatomy.num_layers, remove=anatomy.num_layers - len(keep))
        named, kept = recipe.depth.layers is not None, recipe.depth.keep_pattern
        notes += about_depth(anatomy, keep, named=named, keep_pattern=kept)
    return notes + _about_criterion(recipe, anatomy)


def about_unread_weights(recipe: Recipe, dtype: str, *, none: bool) -> str:
    """Say what the sizes are computed from where no weights file was read. ``none``: there is none."""
    if recipe.model.id.startswith(PACKAGE_SCHEME):
        return f"a GGUF file's weights are converted before they are cut: the sizes are those of {dtype}"
    computed = f"the sizes are those of tensors that are all {dtype}"
    if none:
        return f"{recipe.model.id} has no safetensors weights file, which a run needs: {computed}"
    return f"no weights file was read: {computed}"


def _experts_stay_dense(pruned: PreTrainedModel) -> list[str]:
    stacked = sorted(
        {name for layer in find_layers(pruned)[1] for name, tensor in layer.named_parameters() if tensor.ndim == 3}
    )
    return [f"stays dense, for each expert sees other tokens: {', '.join(stacked)}"] if stacked else []


def _not_refit(anatomy: Anatomy) -> list[str]:
    """What a refit leaves as it was cut, in words."""
    stacked = sorted({unit.path for units in anatomy.units for unit in units if not unit.refit})
    without = [index for index, units in enumerate(anatomy.units) if not any(unit.refit for unit in units)]
    notes = [f"cut without refit, for not every token goes through them: {', '.join(stacked)}"] if stacked else []
    if without:
        layers = "its layers have" if len(without) == anatomy.num_layers else f"layers {ranges(without)} have"
        notes.append(
            f"{layers} no MLP that every token goes through: where layers or heads go, what else writes to the hidden "
            "states is refit"
        )
    return notes


def _unjudged(refit: Refit, samples: int) -> list[str]:
    """What it means that nothing can be held out from a refit, in words."""
    if samples > 1:
        return []
    strength = "the strength that most projections get" if refit.ridge is None else f"ridge {refit.ridge:g}"
    return [
        f"refit: 1 calibration sample leaves no other to judge the repair on; it is made at {strength}, "
        "whether it helps or not"
    ]


def _about_up(anatomy: Anatomy, widths: dict[str, int], *, samples: int) -> list[str]:
    """What solving the up projections costs. Raises RecipeError where none is solved, or none can be judged."""
    if not neurons_of_solved_ups(anatomy, widths):
        gated = any(unit.up for units in anatomy.units for unit in units)
        raise RecipeError(
            "refit.up: only the up projections of gated MLPs that lose neurons and that every token goes through are "
            f"solved again, and {'no neurons of these go' if gated else 'this model has none'}; "
            f"{'narrow them with width, or ' if gated else ''}remove the key"
        )
    if samples < 2:
        raise RecipeError(
            "refit.up: 1 calibration sample leaves no other to judge the solution on; raise calibration.samples, or "
            "remove the key"
        )
    return ["refit.up: pass 2 takes about 5 forward passes in float32 over the calibration tokens longer"]


def _about_ablation(recipe: Recipe, layers: int, *, remove: int) -> list[str]:
    """Say how long the ablations of a depth criterion take."""
    assert recipe.depth is not None
    criterion, (samples, _) = recipe.depth.criterion, recipe.calibration.shape()
    cost = criterion.ablation_cost(layers, remove=remove, samples=samples)
    if cost is None:
        return []
    refit = ", and a refit of every layer in each round" if cost.refits else ""
    return [
        f"depth.criterion {criterion.kind}: {plural(cost.rounds, 'round')} of ablation on "
        f"{plural(cost.windows, 'window')} cost about {cost.forward_passes:.1f} forward passes over the calibration "
        f"tokens{refit}"
    ]


def _about_criterion(recipe: Recipe, anatomy: Anatomy) -> list[str]:
    """What the width criterion costs, and what it misses."""
    if recipe.width is None:
        return []
    criterion = recipe.width.neurons_by
    widths = [
        unit.times * anatomy.widths[unit.field] for units in anatomy.units for unit in units if recipe.width.cuts_mlp
    ]
    operations = sum(criterion.operations(width) for width in widths)
    figure = f": about {operations:.1e} operations in float64 in all" if operations else ""
    notes = [f"width.criterion {criterion.kind} {criterion.cost_note}{figure}"] if criterion.cost_note else []
    if criterion.assumes_refit and recipe.refit is None:
        notes.append(f"width.criterion {criterion.kind} assumes the refit, which is off")
    return notes


def require_room_for_trail(recipe: Recipe, trail: int) -> None:
    """Raise RecipeError where a backward pass needs more disk for hidden states, ``trail`` bytes, than is allowed."""
    allowed = recipe.calibration.stream_disk
    if recipe.width and recipe.width.neurons_by.needs_gradients and trail > allowed:
        raise RecipeError(
            f"calibration.stream_disk: width.criterion {recipe.width.neurons_by.kind} needs the hidden states after "
            f"every layer for its backward pass, {format_size(trail)}, and {format_size(allowed)} are allowed; raise "
            "it, take fewer calibration.samples, or choose another criterion"
        )
