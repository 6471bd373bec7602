"""Find the up projection of a gated MLP, by a proof on the module's own code.

The activations of a gated MLP are (x Uᵀ + b) ∘ s with gates s that do not depend on U. The proof: when each neuron's
row of U (and its bias) is multiplied by a large factor, negative for some neurons, its activation is multiplied by the
same factor. An activation function in between, even ReLU, and a clamp make the proof fail.

Shapes in names: F neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmprune.anatomy.proof import equal_up_to_rounding
from llmprune.anatomy.selection import slice_rows
from llmprune.anatomy.types import FusedSlice, MlpUnit

Tensors = dict[str, Tensor]
_FACTORS = 1024 * torch.tensor([-4.0, -2.0, -1.0, 1.0, 4.0])  # powers of two, large enough to exceed any model's clamp
_TOLERANCE = 1e-5


def find_up(unit: MlpUnit, tensors: Tensors, *, activations: Callable[[Tensors], Tensor]) -> FusedSlice | None:
    """Return the unit's up projection; None where the proof holds for none of its weights.

    ``tensors``: those of a module that has the unit; ``activations``: computes the activations [..., F] of the unit's
    neurons on fixed inputs from the module's tensors.
    """
    before = activations(tensors)
    factors_F = _FACTORS[torch.arange(before.shape[-1]) % len(_FACTORS)]
    for prunable in reversed(unit.tensors[:-1]):
        if tensors[prunable.name].ndim != 2:
            continue
        for entry in reversed(range(sum(prunable.parts))):
            candidate = FusedSlice(prunable, entry)
            after = activations(_scaled(unit, tensors, candidate=candidate, factors_F=factors_F))
            follows = equal_up_to_rounding(after, before * factors_F, tolerance=_TOLERANCE)
            if follows and not equal_up_to_rounding(after, before, tolerance=_TOLERANCE):
                return candidate
    return None


def _scaled(unit: MlpUnit, tensors: Tensors, *, candidate: FusedSlice, factors_F: Tensor) -> Tensors:
    """Multiply the candidate's weights, and the biases of its projection, by each neuron's factor."""
    owner = candidate.tensor.name.rpartition(".")[0]
    scaled = dict(tensors)
    for prunable in (prunable for prunable in unit.tensors[:-1] if prunable.name.rpartition(".")[0] == owner):
        tensor = tensors[prunable.name]
        rows = slice_rows(tensor.shape[prunable.dim], FusedSlice(prunable, candidate.entry))
        factors = factors_F.view(-1, *[1] * (tensor.ndim - 1 - prunable.dim))
        scaled[prunable.name] = tensor.index_copy(prunable.dim, rows, tensor.index_select(prunable.dim, rows) * factors)
    return scaled
