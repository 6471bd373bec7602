"""What can be known before a weight is read: sizes, memory, and every refusal.

Counts come from the model's own code built on the meta device, not from formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.anatomy.blueprint import Config, build_blueprint, find_layers, quiet_transformers, text_config
from llmprune.anatomy.discovery import discover
from llmprune.anatomy.proof import prove_twins, sizes_that_change
from llmprune.anatomy.value import Anatomy
from llmprune.checks import Collected, run_checks
from llmprune.criteria.base import TrialCriterion
from llmprune.criteria.residual import Residual
from llmprune.errors import CheckpointError, ModelError, RecipeError
from llmprune.inputs import Inputs
from llmprune.model.loading import load_config
from llmprune.needs import Memory, bytes_of, bytes_of_window, memory_of, neurons_of_solved_ups
from llmprune.recipe import Depth, Recipe
from llmprune.refit import Refit
from llmprune.remote import resolve
from llmprune.report.value import Figures, Size
from llmprune.report.wording import ranges
from llmprune.schema import format_size
from llmprune.surgery import cut_config
from llmprune.targets import (
    SparsityPlan,
    planned_experts,
    planned_heads,
    planned_layers,
    planned_sparsity,
    planned_widths,
)


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
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """All that is known of a recipe before weights are read. Without a plan there is at least one problem."""

    plan: Plan | None
    anatomy: Anatomy | None
    inputs: Inputs
    collected: Collected

    def require(self, source: str = "") -> tuple[Plan, Anatomy]:
        """Return plan and anatomy. Raises LLMPruneError that lists every problem."""
        self.collected.raise_all(source)
        assert self.plan is not None, "it was made or a problem says why not"
        assert self.anatomy is not None, "as the plan"
        return self.plan, self.anatomy


def make_plan(recipe: Recipe) -> Plan:
    """Plan a recipe without reading weights. Raises LLMPruneError for all that a run would refuse."""
    return survey(recipe).require()[0]


def survey(recipe: Recipe, *, wrong: Iterable[str] = (), problems: Iterable[str] = ()) -> Survey:
    """Plan a recipe and go through every check, whatever the earlier ones found.

    ``wrong``: keys that were left out of the recipe because they are wrong, and what is wrong with them.
    """
    resolve.cache_clear()
    collected = Collected(wrong, problems)
    inputs = Inputs(recipe)
    plan, anatomy = plan_structure(recipe, collected)
    if anatomy is None and any(isinstance(error, ModelError | CheckpointError) for error in collected.errors):
        collected.wrong += ("model",)  # what its config says was said
    run_checks(inputs, collected)
    return Survey(plan, anatomy, inputs, collected)


def plan_structure(recipe: Recipe, collected: Collected) -> tuple[Plan | None, Anatomy | None]:
    """The plan from the config alone, and the anatomy that was found on the way; None where a problem was collected."""
    found, known = collected.attempt("model", ("model",), lambda: _discovered(recipe))
    if not found or known is None:
        return None, None
    config, anatomy = known
    targets = _targets(recipe, anatomy, collected)
    if targets is None:
        return None, anatomy
    reads = ("model", "depth", "width", "experts", "sparsity", "refit", "calibration")
    return collected.attempt("recipe", reads, lambda: _plan(recipe, config, anatomy, targets))[1], anatomy


def _discovered(recipe: Recipe) -> tuple[Config, Anatomy]:
    config = load_config(recipe.model)
    _refuse_quantized(recipe.model.id, config)
    return config, discover(config, recipe.model.trust_remote_code)


@dataclass(frozen=True)
class _Targets:
    """What stays of each kind of unit."""

    layers: tuple[int, ...]
    widths: dict[str, int]
    experts: int | None
    kv_groups: int | None
    notes: tuple[str, ...]


def _targets(recipe: Recipe, anatomy: Anatomy, collected: Collected) -> _Targets | None:
    """What stays; None where a problem was collected."""
    notes: list[str] = []
    model = "model"
    layers, keep = collected.attempt("depth", ("depth", model), lambda: planned_layers(recipe.depth, anatomy))
    neurons, widths = collected.attempt("width", ("width", model), lambda: planned_widths(recipe.width, anatomy, notes))
    mixtures, experts = collected.attempt(
        "experts", ("experts", model), lambda: planned_experts(recipe.experts, anatomy)
    )
    heads, kv_groups = collected.attempt(
        "width.heads", ("width", model), lambda: planned_heads(recipe.width, anatomy, notes)
    )
    if not (layers and neurons and mixtures and heads):
        return None
    assert keep is not None, "planned"
    assert widths is not None, "planned"
    return _Targets(tuple(keep), widths, experts, kv_groups, tuple(notes))


def _plan(recipe: Recipe, config: Config, anatomy: Anatomy, targets: _Targets) -> Plan:
    """The plan from the config and what stays. Raises ModelError and RecipeError for what cannot be done."""
    trust = recipe.model.trust_remote_code
    notes, keep, widths = list(targets.notes), targets.layers, targets.widths
    experts, kv_groups = targets.experts, targets.kv_groups
    dtype = _dtype(recipe, config)
    dense = build_blueprint(config, dtype, trust)
    pruned = build_blueprint(cut_config(config, anatomy, keep, widths, experts, kv_groups), dtype, trust)
    prove_twins(dense, pruned, keep, sizes_that_change(anatomy, widths, experts, kv_groups))
    sparsity = planned_sparsity(
        recipe.sparsity, find_layers(pruned)[1], experts, recipe.calibration.shape(), recipe.refit is not None
    )
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
    memory = memory_of(recipe, dense, pruned, anatomy, widths)
    notes += _about_criterion(recipe, anatomy)
    _require_room_for_trail(recipe, anatomy.num_layers * bytes_of_window(recipe, dense) * recipe.calibration.shape()[0])
    if text_config(config) is not config:
        notes.append("only the text part is pruned, and scored on text: what images need of it is not measured")
    if trust:
        notes.append("the model's own Python code is run (model.trust_remote_code)")
    return Plan(
        model=recipe.model.id,
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        dense=measure_size(
            dense,
            anatomy.widths,
            anatomy.experts.count if anatomy.experts else None,
            anatomy.heads.count if anatomy.heads else None,
        ),
        pruned=measure_size(pruned, anatomy.widths | widths, experts, kv_groups),
        parameters_exact=exact,
        removed_layers=recipe.depth.layers if recipe.depth else (),
        keep_layers=len(keep),
        keep_widths=widths,
        keep_experts=experts,
        keep_kv_groups=kv_groups,
        sparsity=sparsity,
        calibration=recipe.calibration.shape(),
        memory=memory,
        disk=bytes_of(pruned),
        notes=tuple(notes),
    )


def _refuse_quantized(model: str, config: Config) -> None:
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = stored.get("quant_method", "") if isinstance(stored, dict) else ""
        raise ModelError(
            f"the weights of {model} are quantized ({method or 'by a method that is not named'}), "
            "so they cannot be cut and refit; prune the original in float32, bfloat16 or float16"
        )


def measure_size(
    model: PreTrainedModel, widths: dict[str, int], experts: int | None, kv_groups: int | None = None
) -> Size:
    """Sizes of a model that may be without weights. Tied tensors count once."""
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=bytes_of(model),
        layers=len(find_layers(model)[1]),
        widths=widths,
        experts=experts,
        kv_groups=kv_groups,
        kv_bytes_per_token=_cache_bytes_per_token(model),
    )


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
        f"depth.criterion {criterion.kind}: {rounds} round{'' if rounds == 1 else 's'} of trials on {windows} windows "
        f"cost about {passes:.1f} forward passes over the calibration tokens{refit}"
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


def _dtype(recipe: Recipe, config: Config) -> torch.dtype:
    if recipe.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, recipe.model.dtype)
        return dtype
    stored = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _exact(depth: Depth | None, dense: PreTrainedModel) -> bool:
    _, layers = find_layers(dense)
    sizes = {sum(parameter.numel() for parameter in layer.parameters()) for layer in layers}
    return depth is None or depth.layers is not None or len(sizes) == 1


def _cache_bytes_per_token(model: PreTrainedModel) -> int | None:
    """What one more token adds to the key-value cache, from a forward pass without weights; None if it fails."""
    try:
        with quiet_transformers(), torch.device("meta"):
            if all(parameter.is_meta for parameter in model.parameters()):
                shapes = model.to("meta")  # only buffers move: cheaper than building it again
            else:
                shapes = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
            sizes = [_cache_bytes(shapes, length) for length in (2, 3)]
    except Exception:  # some models cannot run without weights: the figure is then left out
        return None
    return sizes[1] - sizes[0]


@torch.no_grad()
def _cache_bytes(shapes: PreTrainedModel, length: int) -> int:
    cache = shapes(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values
    return sum(
        value.numel() * value.itemsize
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor) and value.ndim > 1
    )
