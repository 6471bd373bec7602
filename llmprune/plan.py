"""What can be known before a weight is read: sizes, memory, and every refusal.

Counts come from the model's own code built on the meta device, not from formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.anatomy.blueprint import Config, build_blueprint, find_layers, quiet_transformers, text_config
from llmprune.anatomy.discovery import discover
from llmprune.anatomy.proof import prove_twins
from llmprune.anatomy.value import Anatomy
from llmprune.cut import round_width, width_step
from llmprune.errors import ModelError, RecipeError
from llmprune.evaluation.speed import require_positions
from llmprune.model.loading import load_config
from llmprune.recipe import Depth, Recipe, Width
from llmprune.report.value import Figures, Size
from llmprune.surgery import cut_config


class Memory(Figures):
    """Estimated most bytes in use at once during the two passes."""

    weights: int  # the dense model, wherever the device map puts it
    layer: int  # the largest layer, cut, beside its dense self
    streams: int  # hidden states of all calibration tokens, dense and pruned
    statistics: int  # sums of the refit of one layer, solved in float64

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.layer + self.streams + self.statistics


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
    keep_width: int | None
    calibration: tuple[int, int]  # windows, tokens in each
    memory: Memory
    disk: int  # bytes of the result
    notes: tuple[str, ...]


def make_plan(recipe: Recipe) -> Plan:
    """Plan a recipe from its config. Raises ModelError and RecipeError for what cannot be done."""
    return plan_with_anatomy(recipe)[0]


def plan_with_anatomy(recipe: Recipe) -> tuple[Plan, Anatomy]:
    """The plan, and the anatomy that it found on the way."""
    config = load_config(recipe.model)
    _refuse_quantized(recipe.model.id, config)
    trust = recipe.model.trust_remote_code
    anatomy = discover(config, trust)
    notes: list[str] = []
    keep = _planned_layers(recipe.depth, anatomy)
    width = _planned_width(recipe.width, anatomy, notes)
    _require_something_to_judge(recipe)
    if recipe.evaluation.speed:
        require_positions(recipe.evaluation.speed, config)
    dtype = _dtype(recipe, config)
    dense = build_blueprint(config, dtype, trust)
    pruned = build_blueprint(cut_config(config, anatomy, keep, width), dtype, trust)
    prove_twins(dense, pruned, keep, {anatomy.width: width} if anatomy.width and width else {})
    exact = _exact(recipe.depth, dense)
    if not exact:
        notes.append("layers differ in size: the sizes are those of a cut from the middle, until the scores are known")
    if recipe.refit and not any(anatomy.units) and (recipe.depth or recipe.width):
        notes.append(f"nothing can be refit in this model: {anatomy.width_refusal}")
    if trust:
        notes.append("the model's own Python code is run (model.trust_remote_code)")
    plan = Plan(
        model=recipe.model.id,
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        dense=measure_size(dense, anatomy.width),
        pruned=measure_size(pruned, width),
        parameters_exact=exact,
        removed_layers=recipe.depth.layers if recipe.depth else (),
        keep_layers=len(keep),
        keep_width=width,
        calibration=recipe.calibration.shape(),
        memory=_memory(recipe, dense, pruned, anatomy, width),
        disk=_bytes(pruned),
        notes=tuple(notes),
    )
    return plan, anatomy


def _refuse_quantized(model: str, config: Config) -> None:
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = stored.get("quant_method", "") if isinstance(stored, dict) else ""
        raise ModelError(
            f"the weights of {model} are quantized ({method or 'by a method that is not named'}), "
            "so they cannot be cut and refit; prune the original in float32, bfloat16 or float16"
        )


def measure_size(model: PreTrainedModel, mlp_width: int | None) -> Size:
    """Sizes of a model that may be without weights. Tied tensors count once."""
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=_bytes(model),
        layers=len(find_layers(model)[1]),
        mlp_width=mlp_width,
        kv_bytes_per_token=_cache_bytes_per_token(model),
    )


def _planned_layers(depth: Depth | None, anatomy: Anatomy) -> tuple[int, ...]:
    """Layers kept; where the scores will decide, as many of them, without the middle."""
    count = anatomy.num_layers
    if depth is None:
        return tuple(range(count))
    if depth.layers is not None:
        outside = [index for index in depth.layers if index >= count]
        if outside:
            raise RecipeError(f"depth.layers: the model has layers 0 to {count - 1}, not {outside}; correct the list")
        removed = set(depth.layers)
    else:
        number = depth.remove if depth.remove is not None else count - (depth.keep or 0)
        if number < 0:
            raise RecipeError(
                f"depth.keep: the model has {count} layers, {depth.keep} cannot be kept; keep at most {count}"
            )
        removed = set(_spread(count, number, anatomy.one_of)) if number < count else set(range(number))
    if len(removed) >= count:
        raise RecipeError(
            f"depth.{'layers' if depth.layers else 'remove'}: the model has {count} layers and "
            f"{len(removed)} would go; at least one must stay: remove at most {count - 1}"
        )
    return tuple(index for index in range(count) if index not in removed)


def _spread(count: int, number: int, one_of: tuple[int, ...]) -> list[int]:
    """Some ``number`` of layers, from the middle outwards, the first of ``one_of`` left out."""
    free = [index for index in range(count) if index not in one_of[:1]]
    outwards = sorted(free, key=lambda index: abs(index - count // 2))
    return outwards[:number]


def _planned_width(width: Width | None, anatomy: Anatomy, notes: list[str]) -> int | None:
    """Neurons kept in each layer's MLP, rounded to what hardware likes, with a note where that changes it."""
    if width is None:
        return anatomy.width
    if anatomy.width is None:
        raise RecipeError(
            f"width: the MLPs of this model cannot be narrowed: {anatomy.width_refusal}; remove the section"
        )
    if width.neurons is not None and width.neurons > anatomy.width:
        raise RecipeError(
            f"width.neurons: {width.neurons} is more than the {anatomy.width} neurons that the MLPs have; "
            "keep at most those"
        )
    wanted = width.neurons if width.neurons is not None else (width.mlp or 1.0) * anatomy.width
    kept = round_width(wanted, anatomy.width)
    if abs(kept - wanted) >= 1:
        step = width_step(anatomy.width)
        notes.append(
            f"MLP width {wanted:g} is rounded to {kept}, a multiple of {step} "
            f"({kept / anatomy.width:.1%} of {anatomy.width})"
        )
    return kept


def _require_something_to_judge(recipe: Recipe) -> None:
    if recipe.evaluation.gate and not recipe.evaluation.tasks:
        raise RecipeError("evaluation.gate: there is nothing to judge; name lm-eval tasks in evaluation.tasks")


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


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


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


def _memory(
    recipe: Recipe, dense: PreTrainedModel, pruned: PreTrainedModel, anatomy: Anatomy, width: int | None
) -> Memory:
    samples, length = recipe.calibration.shape()
    hidden = text_config(dense.config).hidden_size
    inputs = width if recipe.refit and width and any(anatomy.units) else 0
    return Memory(
        weights=_bytes(dense),
        layer=_largest(find_layers(dense)[1]) + _largest(find_layers(pruned)[1]),
        streams=2 * samples * length * hidden * dense.dtype.itemsize,
        statistics=inputs * inputs * (4 + 2 * 8) + inputs * hidden * (4 + 2 * 8),
    )


def _largest(layers: Sequence[torch.nn.Module] | torch.nn.ModuleList) -> int:
    return max(_bytes(layer) for layer in layers)
