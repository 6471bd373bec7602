"""What can be known before a weight is read: sizes, memory, and every refusal.

Counts come from the model's own code built on the meta device, not from formulas.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from llmprune.anatomy.blueprint import build_blueprint, find_layers, text_config
from llmprune.anatomy.discovery import discover
from llmprune.anatomy.proof import prove_twins, sizes_that_change
from llmprune.anatomy.value import Anatomy
from llmprune.criteria.base import TrialCriterion
from llmprune.criteria.residual import Residual
from llmprune.errors import RecipeError
from llmprune.evaluation.generation import require_windows
from llmprune.evaluation.speed import require_positions
from llmprune.interop import about_depth, about_head_size, about_layer_count
from llmprune.model.base_files import planned_companions, require_expressible
from llmprune.model.loading import compute_dtype, headers_of, load_config, raw_config
from llmprune.model.prediction_heads import about_heads
from llmprune.model.refusals import require_language_model
from llmprune.model.stored import FileNames, describe_types, kept_dtypes, require_all
from llmprune.needs import Memory, bytes_of, bytes_of_window, memory_of, neurons_of_solved_ups
from llmprune.recipe import Depth, Recipe
from llmprune.refit import Refit
from llmprune.remote import resolve
from llmprune.report.value import BaseFiles, Figures, Size
from llmprune.report.wording import plural, ranges
from llmprune.rounding import wishes_without_effect
from llmprune.schema import format_size
from llmprune.sizes import measure_size
from llmprune.surgery import cut_config
from llmprune.targets import (
    SparsityPlan,
    planned_experts,
    planned_heads,
    planned_layers,
    planned_sparsity,
    planned_widths,
)
from llmprune.texts import PACKAGE_SCHEME


class Plan(Figures):
    """What a run will do, and what it needs."""

    model: str
    model_type: str
    dtype: str
    dense: Size
    pruned: Size
    parameters_exact: bool  # False where layers differ in size and the scores decide which go
    removed_layers: tuple[int, ...] | None  # None where the scores decide
    keep_layers: int
    keep_widths: dict[str, int]  # by config field
    keep_experts: int | None
    keep_kv_groups: int | None  # of attention heads, in each layer
    sparsity: SparsityPlan | None = None
    calibration: tuple[int, int]  # windows, tokens in each
    memory: Memory
    disk: int  # bytes of the result
    base_files: BaseFiles = BaseFiles()
    notes: tuple[str, ...]


def make_plan(recipe: Recipe) -> Plan:
    """Plan a recipe from its config. Raises ModelError and RecipeError for what cannot be done."""
    resolve.cache_clear()
    return plan_with_anatomy(recipe)[0]


def plan_with_anatomy(recipe: Recipe) -> tuple[Plan, Anatomy]:
    """The plan, and the anatomy that it found on the way."""
    config, headers = load_config(recipe.model), headers_of(recipe.model)
    require_language_model(recipe.model, headers, with_tokenizer=_reads_text(recipe))
    trust = recipe.model.trust_remote_code
    anatomy = discover(config, trust)
    notes: list[str] = []
    keep = planned_layers(recipe.depth, anatomy)
    widths = planned_widths(recipe.width, anatomy, notes)
    experts = planned_experts(recipe.experts, anatomy)
    kv_groups = planned_heads(recipe.width, anatomy, notes)
    _require_something_to_judge(recipe)
    if recipe.evaluation.speed:
        require_positions(recipe.evaluation.speed, config)
    if recipe.evaluation.generation and recipe.evaluation.perplexity and not recipe.evaluation.perplexity.tokens:
        require_windows(recipe.evaluation.generation, *recipe.evaluation.perplexity.shape())
    dtype = compute_dtype(recipe.model, config, headers)
    dense = build_blueprint(config, dtype, trust)
    cut = cut_config(config, anatomy, keep, widths, experts, kv_groups)
    require_expressible(recipe.model, config, cut, keep)
    pruned = build_blueprint(cut, dtype, trust)
    prove_twins(dense, pruned, keep, sizes_that_change(anatomy, widths, experts, kv_groups))
    sparsity = planned_sparsity(
        recipe.sparsity, find_layers(pruned)[1], experts, recipe.calibration.shape(), recipe.refit is not None
    )
    idle = wishes_without_effect(recipe, anatomy, widths=widths, kv_groups=kv_groups, sparsity=sparsity)
    if idle and bytes_of(dense) == bytes_of(pruned) and not (sparsity and sparsity.zeros):
        raise RecipeError(idle)
    notes += idle
    names, keep_types = FileNames(dense, headers or {}), recipe.model.dtype == "auto"
    saved = kept_dtypes(names, dtype, keep=keep_types)
    if headers:
        require_all(names, recipe.model.id)
        notes += describe_types(names, dtype, keep=keep_types)
    else:
        notes.append(_about_unread_weights(recipe, dtype))
    notes += [f"stays dense: {said}" for said in sparsity.skipped] if sparsity else []
    notes += _experts_stay_dense(pruned) if sparsity else []
    exact = _exact(recipe.depth, dense)
    if not exact:
        notes.append("layers differ in size: the sizes are those of a cut from the middle, until the scores are known")
    cuts = recipe.depth or recipe.width or recipe.experts
    if recipe.refit and cuts:
        notes += _not_refit(anatomy)
    if recipe.refit and (cuts or (recipe.sparsity and recipe.sparsity.method.refits)):
        notes += _unjudged(recipe.refit, recipe.calibration.shape()[0])
    if recipe.refit and recipe.refit.up:
        notes += _about_up(anatomy, widths, recipe.calibration.shape()[0])
    if recipe.depth and recipe.depth.layers is None:
        notes += _trials(recipe, anatomy.num_layers, anatomy.num_layers - len(keep))
    if recipe.depth:
        named, kept = recipe.depth.layers is not None, recipe.depth.keep_pattern
        notes += about_depth(anatomy, keep, named=named, keep_pattern=kept)
    notes += about_layer_count(dense, pruned)
    notes += about_head_size(config, raw_config(recipe.model) or config.to_dict(), anatomy.heads, kv_groups)
    memory = memory_of(recipe, dense, pruned, anatomy, widths)
    notes += _about_criterion(recipe, anatomy)
    _require_room_for_trail(recipe, anatomy.num_layers * bytes_of_window(recipe, dense) * recipe.calibration.shape()[0])
    if text_config(config) is not config:
        notes.append("only the text part is pruned, and scored on text: what images need of it is not measured")
    notes += about_heads(config)
    companions = planned_companions(recipe.model)
    if trust:
        notes.append("the model's own Python code is run (model.trust_remote_code)")
    size = measure_size(pruned, anatomy.widths | widths, experts, kv_groups, stored=saved, layers=keep)
    plan = Plan(
        model=recipe.model.id,
        model_type=config.model_type,
        dtype=_name_of(dtype),
        dense=measure_size(
            dense,
            anatomy.widths,
            anatomy.experts.count if anatomy.experts else None,
            anatomy.heads.count if anatomy.heads else None,
            stored=names.dtypes,
        ),
        pruned=size,
        parameters_exact=exact,
        removed_layers=recipe.depth.layers if recipe.depth else (),
        keep_layers=len(keep),
        keep_widths=widths,
        keep_experts=experts,
        keep_kv_groups=kv_groups,
        sparsity=sparsity,
        calibration=recipe.calibration.shape(),
        memory=memory,
        disk=size.bytes,
        base_files=BaseFiles(carried=companions.carried, left=companions.left),
        notes=tuple(notes),
    )
    return plan, anatomy


def _about_unread_weights(recipe: Recipe, dtype: torch.dtype) -> str:
    if recipe.model.id.startswith(PACKAGE_SCHEME):
        return f"a GGUF file's weights are converted before they are cut: the sizes are those of {_name_of(dtype)}"
    return f"no weights file was read: the sizes are those of tensors that are all {_name_of(dtype)}"


def _reads_text(recipe: Recipe) -> bool:
    evaluation = recipe.evaluation
    windows = [one for one in (recipe.calibration, evaluation.perplexity) if one is not None]
    return bool(evaluation.tasks) or any(one.tokens is None for one in windows)


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


def _about_up(anatomy: Anatomy, widths: dict[str, int], samples: int) -> list[str]:
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


def _trials(recipe: Recipe, layers: int, remove: int) -> list[str]:
    """What the trials of a depth criterion cost, in words."""
    assert recipe.depth is not None
    criterion, (samples, _) = recipe.depth.criterion, recipe.calibration.shape()
    if not isinstance(criterion, TrialCriterion):
        return []
    windows, rounds = min(criterion.windows, samples), criterion.horizon(remove)
    passes = sum((layers - done) / 2 + 1 for done in range(rounds)) * windows / samples
    refit = ""
    if isinstance(criterion, Residual):
        passes += sum((layers - done) / layers for done in range(rounds)) * criterion.shares(samples)[1] / samples
        refit = ", and a refit of every layer in each round"
    return [
        f"depth.criterion {criterion.kind}: {plural(rounds, 'round')} of trials on {plural(windows, 'window')} "
        f"cost about {passes:.1f} forward passes over the calibration tokens{refit}"
    ]


def _require_something_to_judge(recipe: Recipe) -> None:
    if recipe.evaluation.gate and not recipe.evaluation.tasks:
        raise RecipeError("evaluation.gate: there is nothing to judge; name lm-eval tasks in evaluation.tasks")


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
    notes = [f"width.criterion {criterion.kind} {criterion.cost}{figure}"] if criterion.cost else []
    if criterion.assumes_refit and recipe.refit is None:
        notes.append(f"width.criterion {criterion.kind} assumes the refit, which is off")
    return notes


def _require_room_for_trail(recipe: Recipe, trail: int) -> None:
    """The walk back needs the dense hidden states after every layer, so many bytes in all."""
    allowed = recipe.calibration.stream_disk
    if recipe.width and recipe.width.neurons_by.takes != "activations" and trail > allowed:
        raise RecipeError(
            f"calibration.stream_disk: width.criterion {recipe.width.neurons_by.kind} goes back over the hidden states "
            f"after every layer, {format_size(trail)}, and {format_size(allowed)} are allowed; raise it, take fewer "
            "calibration.samples, or choose another criterion"
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exact(depth: Depth | None, dense: PreTrainedModel) -> bool:
    _, layers = find_layers(dense)
    sizes = {sum(parameter.numel() for parameter in layer.parameters()) for layer in layers}
    return depth is None or depth.layers is not None or len(sizes) == 1
