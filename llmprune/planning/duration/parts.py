"""Parts of a run with their work, counted before it from the models without weights.

Parts have the names that reports of progress use, in the order of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.types import Anatomy
from llmprune.planning.duration.operations import LayerCost, Work, costs_of, head_operations
from llmprune.planning.memory.device_memory import BatchSizes
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.base import Figures


class Part(Figures):
    """Part of a run: ``step`` is its name in the report, ``name`` the beginning of its name in reports of progress."""

    step: str
    name: str
    work: Work | None  # None: not known before the run
    items: int | None = None  # layers that its progress counts; None where the count starts over within the part
    shared: bool = False  # divided among the processes; otherwise the first one does it


class RunWork(Figures):
    """Work of a run, part by part in their order, and of one forward pass over the calibration tokens.

    ``hidden``: hidden size, which the rates depend on. ``check``: of the calibration check; None where it adds nothing.
    """

    hidden: int
    forward: Work
    check: Work | None = None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class PlannedModels:
    """Dense and pruned model without weights, the anatomy of the dense one, and the parts of it that are kept.

    ``pruned_bytes``: bytes of the pruned model's files. ``batches``: windows that a layer processes at a time.
    ``reference``: parameters of the model that is trained towards, relative to those of ``dense``: another one by
    ``against``.
    """

    dense: PreTrainedModel
    pruned: PreTrainedModel
    anatomy: Anatomy
    planned: PlannedCut
    pruned_bytes: int
    batches: BatchSizes
    reference: float = 1.0

    def reference_pass(self, length: int) -> float:
        """Return the operations of the reference's forward pass, relative to the pruned model's."""
        dense, pruned = (
            sum(cost.mixer + cost.mlp for cost in costs) + head_operations(model)
            for model, costs in ((self.dense, self.dense_costs(length)), (self.pruned, self.pruned_costs(length)))
        )
        return self.reference * dense / pruned

    @property
    def hidden(self) -> int:
        """Hidden size of both models."""
        return int(text_config(self.dense.config).hidden_size)

    @property
    def itemsize(self) -> int:
        """Bytes of one value of the hidden states."""
        return int(self.dense.dtype.itemsize)

    def dense_costs(self, length: int) -> tuple[LayerCost, ...]:
        """Return the cost of each dense layer, for windows of ``length`` tokens."""
        return tuple(cost.at(length) for cost in self._dense_costs)

    def pruned_costs(self, length: int) -> tuple[LayerCost, ...]:
        """Return the cost of each layer that is kept, as it will be."""
        return tuple(cost.at(length) for cost in self._pruned_costs)

    @cached_property
    def pruned_layers(self) -> nn.ModuleList:
        """Layers of the pruned model."""
        return find_layers(self.pruned)[1]

    @cached_property
    def _dense_costs(self) -> tuple[LayerCost, ...]:
        return costs_of(self.dense, self.anatomy, layers=range(self.anatomy.num_layers))

    @cached_property
    def _pruned_costs(self) -> tuple[LayerCost, ...]:
        return costs_of(self.pruned, self.anatomy, layers=self.planned.layers)


@dataclass(frozen=True)
class Tokens:
    """Calibration tokens of a run: windows, tokens of a window, windows a batch."""

    windows: int
    length: int
    batch_size: int

    @classmethod
    def of(cls, recipe: Recipe, models: PlannedModels) -> Tokens:
        """Return the calibration tokens of a recipe, in the batches of its plan."""
        return cls(*recipe.calibration.shape(), models.batches.calibration)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.windows * self.length

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-self.windows // self.batch_size)


def forward_work(costs: tuple[LayerCost, ...], tokens: Tokens) -> Work:
    """Return the work of a forward pass through all layers, without the head."""
    return Work.total(cost.run(tokens.count, tokens.batches) for cost in costs)


def visited(costs: tuple[LayerCost, ...]) -> Work:
    """Return the work of bringing each layer's weights to the device once."""
    return Work(weights=sum(cost.bytes for cost in costs))


def is_scored(recipe: Recipe) -> bool:
    """Check whether pass 1 runs."""
    return bool(recipe.layer_criterion or recipe.width or recipe.experts or recipe.hidden)


def is_cached(recipe: Recipe, models: PlannedModels) -> bool:
    """Check whether pass 1 may store the dense hidden states after every layer for pass 2, if the disk has space."""
    tokens = Tokens.of(recipe, models)
    size = models.anatomy.num_layers * tokens.count * models.hidden * models.itemsize
    return is_scored(recipe) and size <= recipe.calibration.stream_disk
