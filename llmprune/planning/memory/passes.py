"""Estimate the memory of a run from models without weights: the parts that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.projections import projections_of
from llmprune.anatomy.types import Anatomy
from llmprune.criteria.base import ScoringSize
from llmprune.planning.memory.activations import token_activations
from llmprune.planning.memory.device_memory import MemoryPlanner, Windows, WorkingSet
from llmprune.planning.memory.machine import Machine
from llmprune.planning.memory.routed_experts import refit_statistics, stored_values, widest_experts
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.base import Figures


class Memory(Figures):
    """Estimated peak of the two passes, in bytes."""

    weights: int  # the dense model, in its files
    layer: int  # the largest layer, dense and cut
    hidden_states: int  # those of all calibration tokens, dense and pruned
    statistics: int  # sums of one layer for its refit or for its scores, whichever is larger


def memory_of(
    recipe: Recipe, dense: PreTrainedModel, *, pruned: PreTrainedModel, anatomy: Anatomy, widths: dict[str, int]
) -> Memory:
    """Return the peak memory of a run. The models may be without weights; ``widths``: neurons kept, by config field."""
    samples, length = recipe.calibration.shape()
    hidden = text_config(dense.config).hidden_size
    kept = anatomy.widths | widths
    units = [unit for of_layer in anatomy.units for unit in of_layer if unit.refit and recipe.refit]
    inputs = max((unit.times * kept[unit.field] for unit in units), default=0)
    removed = max((unit.times * (anatomy.widths[unit.field] - kept[unit.field]) for unit in units), default=0)
    sparse = _sparse_statistics(recipe, pruned, anatomy=anatomy)
    size = _scoring_size(recipe, dense, anatomy=anatomy, keep_layers=len(find_layers(pruned)[1]))
    depth = recipe.layer_criterion
    folds = recipe.refit.folds(recipe.calibration.number_of_sources()) if recipe.refit else 1
    return Memory(
        weights=parameter_bytes(dense),
        layer=_largest(find_layers(dense)[1]) + _largest(find_layers(pruned)[1]),
        hidden_states=2 * samples * bytes_of_window(recipe, dense)
        + (depth.hidden_state_bytes(size) if depth else 0)
        + _refit_bytes(recipe, dense, anatomy=anatomy, inputs=inputs)
        + samples * length * stored_values(recipe, anatomy, hidden=hidden, itemsize=dense.dtype.itemsize)
        + _staged_layer_bytes(recipe, dense, pruned=pruned)
        + _up_refit_bytes(recipe, dense, neurons=neurons_of_up_refit(anatomy, widths))
        + _narrow_bytes(recipe, dense, pruned=pruned),
        statistics=max(
            4 * inputs * (inputs * folds + max(inputs, removed) + hidden * 4) + sparse,
            refit_statistics(recipe, anatomy, widths=kept, hidden=hidden, folds=folds),
            recipe.width.neuron_criterion.memory(size.inputs, recipe.calibration.summed_sources) if recipe.width else 0,
            depth.statistics_bytes(size) if depth else 0,
            _training_bytes(recipe, pruned),
            4 * hidden * (hidden * (folds + 1) + hidden * 4) if recipe.hidden and recipe.refit else 0,
        ),
    )


def memory_planner(
    recipe: Recipe,
    dense: PreTrainedModel,
    *,
    pruned: PreTrainedModel,
    anatomy: Anatomy,
    memory: Memory,
    machine: Machine,
) -> MemoryPlanner:
    """Return the planner of a machine's devices. The models may be without weights; ``memory``: of the same run."""
    layers, samples, generated = find_layers(dense)[1], recipe.calibration.shape()[0], recipe.calibration.generated
    model = sum(map(parameter_bytes, layers))
    calibration = _windows(recipe.calibration, recipe.calibration.shape(), processes=machine.processes)
    text = recipe.evaluation.perplexity
    held_out = _windows(text, text.shape(), processes=machine.processes) if text else None
    working = WorkingSet(
        outside=parameter_bytes(dense) - model,
        model=model,
        layer=_largest(layers),
        cut=_largest(find_layers(pruned)[1]),
        statistics=memory.statistics,
        hidden_states=memory.hidden_states * calibration.number // samples,
        buffer=calibration.number * bytes_of_window(recipe, dense),
    )
    activations = token_activations(
        dense,
        anatomy,
        length=max(calibration.length, held_out.length if held_out else 0),
        gradients=recipe.width is not None and recipe.width.windows_for_gradients(samples, generated) > 0,
        refits=recipe.refit is not None or recipe.sparsity is not None,
        trains=recipe.refit is not None and recipe.refit.block,
    )
    return MemoryPlanner(machine, working, activations, calibration, held_out, recipe.calibration.stream_memory)


def _windows(settings: TokenWindows, shape: tuple[int, int], *, processes: int) -> Windows:
    """Return the windows of one of so many processes that share them."""
    number, length = shape
    chosen = None if settings.batch_size == "auto" else settings.batch_size
    return Windows(-(-number // processes), length, chosen)


def _refit_bytes(recipe: Recipe, dense: PreTrainedModel, *, anatomy: Anatomy, inputs: int) -> int:
    """Bytes of the activations that a refit stores for all windows. ``inputs``: of the widest output projection.

    These are the output of the token mixer (first the dense layer's, then the pruned layer's), the output of the dense
    MLP's output projection where a norm follows it, and the dense hidden states before a gap. One mixer and one MLP a
    layer are counted, and a norm in every model, because only the weights show whether there is one. Without sparsity
    the inputs of the MLP's output projection are stored too.
    """
    if not (recipe.refit and recipe.removes_parts):
        return 0
    has_mlp = any(unit.refit for units in anatomy.units for unit in units)
    values = (1 + has_mlp + (recipe.depth is not None)) * text_config(dense.config).hidden_size
    values += inputs if recipe.sparsity is None else 0
    samples, length = recipe.calibration.shape()
    return int(samples * length * values * dense.dtype.itemsize)


def _narrow_bytes(recipe: Recipe, dense: PreTrainedModel, *, pruned: PreTrainedModel) -> int:
    """Bytes of what is stored for all windows where residual channels are cut.

    These are the hidden states with the kept channels; with a refit also, of the layer with all channels, the inputs of
    two groups of readers, and with the kept channels the outputs of two norms and of a writer, and twice an output of
    the layer under repair.
    """
    if recipe.hidden is None:
        return 0
    size, kept = (text_config(model.config).hidden_size for model in (dense, pruned))
    values = kept + (2 * size + 5 * kept if recipe.refit else 0)
    return int(recipe.calibration.shape()[0] * bytes_of_window(recipe, dense) * values // size)


def _staged_layer_bytes(recipe: Recipe, dense: PreTrainedModel, *, pruned: PreTrainedModel) -> int:
    """Bytes that a layer run in stages stores for all windows.

    These are the inputs of an output projection, its output and that of the previous output projection, and with a
    refit also the dense layer's output.
    """
    if recipe.sparsity is None or recipe.sparsity.required_moments(recipe.refit is not None) == "nothing":
        return 0
    outputs = 3 if recipe.refit and recipe.sparsity.method.refits else 2
    widest = max(one.inputs for layer in find_layers(pruned)[1] for one in projections_of(layer))
    hidden: int = text_config(dense.config).hidden_size
    return recipe.calibration.shape()[0] * bytes_of_window(recipe, dense) * (outputs * hidden + widest) // hidden


def neurons_of_up_refit(anatomy: Anatomy, widths: dict[str, int]) -> int:
    """Return the neurons kept by the widest unit whose up projection ``refit.up`` refits; 0 where there is none."""
    kept = [
        unit.times * widths[unit.field]
        for units in anatomy.units
        for unit in units
        if unit.up and widths.get(unit.field, anatomy.widths[unit.field]) < anatomy.widths[unit.field]
    ]
    return max(kept, default=0)


def _up_refit_bytes(recipe: Recipe, dense: PreTrainedModel, *, neurons: int) -> int:
    """Bytes that the refit of an up projection stores for all windows.

    These are its inputs and gates, and in float32 the residual and the output of one step.
    """
    if not (recipe.refit and recipe.refit.up and neurons):
        return 0
    samples, length = recipe.calibration.shape()
    hidden: int = text_config(dense.config).hidden_size
    each: int = (hidden + neurons) * dense.dtype.itemsize + 2 * 4 * hidden
    return samples * length * each


def _training_bytes(recipe: Recipe, pruned: PreTrainedModel) -> int:
    """Bytes of the training of the largest pruned layer.

    These are its weights under training and the best so far, gradients in both types, and in float32 Adam's two
    moments and, of other types, the weights.
    """
    if not (recipe.refit and recipe.refit.block):
        return 0
    itemsize = pruned.dtype.itemsize
    of_each = 2 * itemsize + 4 * 4 if itemsize == 4 else 3 * itemsize + 4 * 4
    entries = max(sum(one.numel() for one in layer.parameters()) for layer in find_layers(pruned)[1])
    return int(entries * of_each)


def _sparse_statistics(recipe: Recipe, pruned: PreTrainedModel, *, anatomy: Anatomy) -> int:
    """Bytes of XᵀX, its factor, and the candidate weights, for the largest matrix that is made sparse."""
    sparsity = recipe.sparsity
    if sparsity is None or sparsity.required_moments(recipe.refit is not None) != "gram":
        return 0
    layers = find_layers(pruned)[1]
    sizes = [(one.inputs, one.outputs) for layer in layers for one in projections_of(layer) if sparsity.names(one)]
    experts = widest_experts(anatomy, {})
    if experts is not None:
        hidden, (_, width) = text_config(pruned.config).hidden_size, experts
        sizes += [(hidden, 2 * width), (width, hidden)]
    weights = 6 + sparsity.permutes  # in another order too
    return max((4 * inputs * (2 * inputs + weights * outputs) for inputs, outputs in sizes), default=0)


def bytes_of_window(recipe: Recipe, dense: PreTrainedModel) -> int:
    """Return the bytes of the hidden states of one calibration window."""
    size: int = recipe.calibration.shape()[1] * text_config(dense.config).hidden_size * dense.dtype.itemsize
    return size


def _scoring_size(recipe: Recipe, dense: PreTrainedModel, *, anatomy: Anatomy, keep_layers: int) -> ScoringSize:
    """Return the sizes that the memory of scoring layers depends on, from a model without weights."""
    samples, length = recipe.calibration.shape()
    return ScoringSize(
        layers=anatomy.num_layers,
        remove=anatomy.num_layers - keep_layers,
        samples=samples,
        length=length,
        hidden=text_config(dense.config).hidden_size,
        inputs=max((unit.times * anatomy.widths[unit.field] for units in anatomy.units for unit in units), default=0),
        itemsize=dense.dtype.itemsize,
    )


def _largest(layers: Sequence[torch.nn.Module] | torch.nn.ModuleList) -> int:
    return max(parameter_bytes(layer) for layer in layers)


def parameter_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a module's parameters, which may be on the meta device."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
