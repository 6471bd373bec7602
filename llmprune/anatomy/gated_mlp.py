"""Which projection of a gated MLP is its up projection: proven on the module's own code.

The activations of a gated MLP are (x Uᵀ + b) ∘ s with gates s that do not depend on U. The proof: when each neuron's
row of U (and its bias) is multiplied by a large number of its own, some of them negative, so is its activation. An
activation function between fails it, ReLU too, and a clamp.

Shapes: F neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmprune.anatomy.selection import slice_rows
from llmprune.anatomy.types import FusedSlice, MlpUnit

Tensors = dict[str, Tensor]
_FACTORS = 1024 * torch.tensor([-4.0, -2.0, -1.0, 1.0, 4.0])  # powers of two, and beyond what any model clamps at


def find_up(unit: MlpUnit, tensors: Tensors, *, activations: Callable[[Tensors], Tensor]) -> FusedSlice | None:
    """The unit's up projection; None where none of its weights is proven one.

    ``tensors``: those of a module that has the unit; ``activations``: what its neurons then are on some tokens.
    """
    before = activations(tensors)
    factors_F = _FACTORS[torch.arange(before.shape[-1]) % len(_FACTORS)]
    for cut in reversed(unit.tensors[:-1]):
        if tensors[cut.name].ndim != 2:
            continue
        for entry in reversed(range(sum(cut.parts))):
            strand = FusedSlice(cut, entry)
            after = activations(_scaled(unit, tensors, strand=strand, factors_F=factors_F))
            if _same(after, before * factors_F) and not _same(after, before):
                return strand
    return None


def _scaled(unit: MlpUnit, tensors: Tensors, *, strand: FusedSlice, factors_F: Tensor) -> Tensors:
    """The tensors with a factor for each neuron on the strand's weights, and on the biases beside them."""
    owner = strand.tensor.name.rpartition(".")[0]
    scaled = dict(tensors)
    for cut in (cut for cut in unit.tensors[:-1] if cut.name.rpartition(".")[0] == owner):
        tensor = tensors[cut.name]
        rows = slice_rows(tensor.shape[cut.dim], FusedSlice(cut, strand.entry))
        factors = factors_F.view(-1, *[1] * (tensor.ndim - 1 - cut.dim))
        scaled[cut.name] = tensor.index_copy(cut.dim, rows, tensor.index_select(cut.dim, rows) * factors)
    return scaled


def _same(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-5 * second.abs().max())
