"""How much memory a run needs, from models without weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.projections import projections_of
from llmprune.anatomy.types import Anatomy
from llmprune.criteria.base import DepthCriterion, ScoringSize
from llmprune.recipe.recipe import Recipe
from llmprune.results.schema import Figures


class Memory(Figures):
    """Estimated most bytes in use at once during the two passes."""

    weights: int  # the dense model, wherever the device map puts it
    layer: int  # the largest layer, cut, beside its dense self
    streams: int  # hidden states of all calibration tokens, dense and pruned
    statistics: int  # sums of one layer for its refit or for its scores, whichever is more

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.layer + self.streams + self.statistics


def memory_of(
    recipe: Recipe, dense: PreTrainedModel, *, pruned: PreTrainedModel, anatomy: Anatomy, widths: dict[str, int]
) -> Memory:
    """The most memory of a run of a recipe, from models without weights; ``widths``: neurons kept, by config field."""
    samples, _ = recipe.calibration.shape()
    hidden = text_config(dense.config).hidden_size
    kept = anatomy.widths | widths
    inputs = max((unit.times * kept[unit.field] for units in anatomy.units for unit in units if unit.refit), default=0)
    inputs = inputs if recipe.refit else 0
    sparse = _sparse_statistics(recipe, pruned)
    size = _scoring_size(recipe, dense, anatomy=anatomy, keep_layers=len(find_layers(pruned)[1]))
    depth = _depth_criterion(recipe)
    folds = recipe.refit.folds(len(recipe.calibration.text_sources())) if recipe.refit else 1
    return Memory(
        weights=bytes_of(dense),
        layer=_largest(find_layers(dense)[1]) + _largest(find_layers(pruned)[1]),
        streams=2 * samples * bytes_of_window(recipe, dense)
        + (depth.stream_bytes(size) if depth else 0)
        + _noted(recipe, dense, anatomy=anatomy)
        + _staged(recipe, dense, pruned=pruned)
        + _gated(recipe, dense, neurons=neurons_of_solved_ups(anatomy, widths)),
        statistics=max(
            4 * inputs * (inputs * (folds + 1) + hidden * 4) + sparse,
            recipe.width.neurons_by.memory(size.inputs) if recipe.width else 0,
            depth.statistics_bytes(size) if depth else 0,
        ),
    )


def _noted(recipe: Recipe, dense: PreTrainedModel, *, anatomy: Anatomy) -> int:
    """Bytes of what a refit keeps of all windows: what the dense layer's token mixer writes, then the pruned one's;
    what the dense MLP's output projection writes, where a norm follows it; and the dense stream before a gap.

    One mixer and one MLP a layer are counted, with a norm in every model: only its weights show whether it has one.
    """
    if not (recipe.refit and (recipe.depth or recipe.width or recipe.experts)):
        return 0
    has_mlp = any(unit.refit for units in anatomy.units for unit in units)
    streams = 1 + has_mlp + (recipe.depth is not None)
    return streams * recipe.calibration.shape()[0] * bytes_of_window(recipe, dense)


def _staged(recipe: Recipe, dense: PreTrainedModel, *, pruned: PreTrainedModel) -> int:
    """Bytes that a layer in stages keeps of all windows: the inputs of an output projection, what that and the one
    before it write, and with the refit what the dense one wrote.
    """
    if recipe.sparsity is None or _sums(recipe) == "nothing":
        return 0
    outputs = 3 if recipe.refit and recipe.sparsity.method.refits else 2
    widest = max(one.inputs for layer in find_layers(pruned)[1] for one in projections_of(layer))
    hidden: int = text_config(dense.config).hidden_size
    return recipe.calibration.shape()[0] * bytes_of_window(recipe, dense) * (outputs * hidden + widest) // hidden


def neurons_of_solved_ups(anatomy: Anatomy, widths: dict[str, int]) -> int:
    """Neurons kept by the widest unit whose up projection ``refit.up`` solves again; 0: there is none."""
    kept = [
        unit.times * widths[unit.field]
        for units in anatomy.units
        for unit in units
        if unit.up and widths.get(unit.field, anatomy.widths[unit.field]) < anatomy.widths[unit.field]
    ]
    return max(kept, default=0)


def _gated(recipe: Recipe, dense: PreTrainedModel, *, neurons: int) -> int:
    """Bytes that the solve of an up projection keeps of all windows: inputs, gates, and in float32 what is missing
    and what a step writes.
    """
    if not (recipe.refit and recipe.refit.up and neurons):
        return 0
    samples, length = recipe.calibration.shape()
    hidden: int = text_config(dense.config).hidden_size
    each: int = (hidden + neurons) * dense.dtype.itemsize + 2 * 4 * hidden
    return samples * length * each


def _sums(recipe: Recipe) -> str:
    """What the making of sparse matrices sums over their inputs."""
    assert recipe.sparsity is not None
    return recipe.sparsity.method.required_moments(recipe.refit is not None and recipe.sparsity.method.refits)


def _sparse_statistics(recipe: Recipe, pruned: PreTrainedModel) -> int:
    """Bytes of XᵀX, its factor, and the weights that are tried, of the largest projection that is made sparse."""
    sparsity = recipe.sparsity
    if sparsity is None or _sums(recipe) != "gram":
        return 0
    projections = [one for layer in find_layers(pruned)[1] for one in projections_of(layer)]
    return max(4 * one.inputs * (2 * one.inputs + 6 * one.outputs) for one in projections if sparsity.names(one))


def bytes_of_window(recipe: Recipe, dense: PreTrainedModel) -> int:
    """Bytes of the hidden states of one calibration window."""
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


def _depth_criterion(recipe: Recipe) -> DepthCriterion | None:
    """Return the criterion that layers are scored by; None where none are."""
    return recipe.depth.criterion if recipe.depth and recipe.depth.layers is None else None


def _largest(layers: Sequence[torch.nn.Module] | torch.nn.ModuleList) -> int:
    return max(bytes_of(layer) for layer in layers)


def bytes_of(module: torch.nn.Module) -> int:
    """Of all parameters, which may be without values."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
