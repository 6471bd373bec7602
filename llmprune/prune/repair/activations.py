"""Activations of one kept layer on the pruned hidden states, uncut and cut, batch by batch.

Shapes: B batch, L sequence length, D hidden size, F inputs of a unit's output projection, K of them kept, R removed,
I inputs of an up projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of, outputs_of
from llmprune.anatomy.selection import outputs_first, slice_rows
from llmprune.anatomy.types import FusedSlice, Unit
from llmprune.layerwise.cached_forward import CachedForward
from llmprune.layerwise.hooks import computed_by


@dataclass(frozen=True)
class CutActivations:
    """One batch: kept and removed inputs of the cut unit's output projection, and the output of the cut layer."""

    batch: int
    input_BLK: Tensor
    removed_BLR: Tensor
    output_BLD: Tensor


def run_cut(
    runs: CachedForward, new: int, *, uncut: nn.Module, cut: nn.Module, unit: Unit, keep_K: Tensor | None
) -> Iterator[CutActivations]:
    """Run the uncut layer with the output projection of the cut one on the inputs that are kept."""
    weight = unit.tensors[-1]
    removed_R, _ = removed_rows(outputs_first(uncut.get_parameter(weight.name), weight), keep_K)
    keep_K = None if keep_K is None else keep_K.to(removed_R.device)
    projection, seen = cut.get_submodule(unit.output), list[tuple[Tensor, Tensor]]()

    def compute(input_BLF: Tensor) -> Tensor:
        input_BLK = input_BLF if keep_K is None else input_BLF[..., keep_K]
        seen.append((input_BLK, input_BLF[..., removed_R]))
        output: Tensor = projection(input_BLK)
        return output

    with computed_by(uncut.get_submodule(unit.output), compute):
        for batch, hidden_BLD, output_BLD in runs.outputs(new, uncut):
            input_BLK, removed_BLR = (value.view(*hidden_BLD.shape[:2], -1) for value in seen.pop())
            yield CutActivations(batch, input_BLK, removed_BLR, output_BLD)


@dataclass(frozen=True)
class ProjectionOutputs:
    """Outputs of a unit's output projection in the uncut and in the cut layer."""

    uncut_BLD: Tensor
    cut_BLD: Tensor


@dataclass(frozen=True)
class LayerActivations:
    """One batch: inputs of the cut unit's output projection, and outputs of the layer and of it, uncut and cut."""

    batch: int
    input_BLK: Tensor
    uncut_BLD: Tensor
    cut_BLD: Tensor
    projection: ProjectionOutputs


def run_both(
    runs: CachedForward, new: int, *, uncut: nn.Module, cut: nn.Module, unit: Unit
) -> Iterator[LayerActivations]:
    """Run the layer uncut and cut, where they differ in more than the unit's neurons."""
    seen: list[Tensor] = []
    written: list[Tensor] = []
    pairs = zip(runs.outputs(new, uncut), runs.outputs(new, cut), strict=True)
    with ExitStack() as hooks:
        hooks.enter_context(inputs_of(cut.get_submodule(unit.output), seen.append))
        for layer in (uncut, cut):
            hooks.enter_context(outputs_of(layer.get_submodule(unit.output), written.append))
        for (batch, hidden_BLD, uncut_BLD), (_, _, cut_BLD) in pairs:
            input_BLK = seen.pop().view(*hidden_BLD.shape[:2], -1)
            cut_written, uncut_written = written.pop(), written.pop()
            projection = ProjectionOutputs(uncut_written.view_as(uncut_BLD), cut_written.view_as(cut_BLD))
            yield LayerActivations(batch, input_BLK, uncut_BLD, cut_BLD, projection)


@dataclass(frozen=True)
class GatedActivations:
    """One batch: inputs of the up projection, gates, outputs of the cut layer and of its output projection."""

    input_BLI: Tensor
    gates_BLF: Tensor
    output_BLD: Tensor
    written_BLD: Tensor


def run_gated(
    runs: CachedForward, new: int, *, cut: nn.Module, output: str, up: FusedSlice
) -> Iterator[GatedActivations]:
    """Run the cut layer. The gate of a neuron is its activation divided by the output of its up projection."""
    name = up.tensor.name
    ups: list[Tensor] = []
    inputs: list[Tensor] = []
    activations: list[Tensor] = []
    written: list[Tensor] = []
    weight = cut.get_parameter(name)
    rows_F = slice_rows(weight.shape[up.tensor.dim], up).to(weight.device)
    with ExitStack() as hooks:
        up_module, output_module = cut.get_submodule(name.rpartition(".")[0]), cut.get_submodule(output)
        hooks.enter_context(inputs_of(up_module, inputs.append))
        hooks.enter_context(outputs_of(up_module, ups.append))
        hooks.enter_context(inputs_of(output_module, activations.append))
        hooks.enter_context(outputs_of(output_module, written.append))
        for _, hidden_BLD, output_BLD in runs.outputs(new, cut):
            tokens = hidden_BLD.shape[:2]
            up_BLF = ups.pop().view(*tokens, -1)[..., rows_F]
            gates_BLF = (activations.pop().view(*tokens, -1) / up_BLF).nan_to_num_(0, 0, 0)  # an up of 0 gives no gate
            input_BLI, written_BLD = inputs.pop().view(*tokens, -1), written.pop().view_as(output_BLD)
            yield GatedActivations(input_BLI, gates_BLF, output_BLD, written_BLD)


def removed_rows(weight_DF: Tensor, keep_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the indices [R] of a projection's removed inputs, and their rows [R, D] of its transposed weight.

    Both are on the weight's device: indices on another are copied for every batch.
    """
    removed_F = torch.ones(weight_DF.shape[1], dtype=torch.bool)
    removed_F[keep_K if keep_K is not None else slice(None)] = False
    removed_R = removed_F.nonzero().squeeze(1).to(weight_DF.device)
    return removed_R, weight_DF[:, removed_R].T
