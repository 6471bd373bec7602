"""What a kept layer does with the pruned stream, before and after its cut, a batch at a time.

Shapes: B batch, L sequence length, D hidden size, F inputs of a unit's projection, K of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.selection import outputs_first, slice_rows
from llmprune.anatomy.types import MlpUnit, Unit
from llmprune.layerwise.cached_forward import Reruns
from llmprune.layerwise.forward import Decoder, inputs_of, outputs_of


@dataclass(frozen=True)
class Reading:
    """One batch: inputs of the cut unit's output projection, and outputs of the layer uncut (full) and cut.

    ``*_written_BLD``: outputs of the projection itself, where they were read.
    """

    batch: int
    input_BLF: Tensor
    full_BLD: Tensor
    cut_BLD: Tensor
    full_written_BLD: Tensor | None = None
    cut_written_BLD: Tensor | None = None


def read_uncut(
    runs: Reruns, new: int, *, uncut: nn.Module, unit: Unit, keep_K: Tensor | None, scale: float
) -> Iterator[Reading]:
    """Read by running the uncut layer alone: without its lost neurons it puts out ``scale`` × their share less."""
    output = unit.tensors[-1]
    weight_DF = outputs_first(uncut.get_parameter(output.name), output)
    gone_R, weight_RD = lost_rows(weight_DF, keep_K)
    seen: list[Tensor] = []
    with inputs_of(uncut.get_submodule(unit.output), seen.append):
        for batch, hidden_BLD, full_BLD in runs.outputs(new, uncut):
            input_BLF = seen.pop().view(*hidden_BLD.shape[:2], -1)
            if keep_K is None:
                yield Reading(batch, input_BLF, full_BLD, full_BLD)
                continue
            cut_BLD = full_BLD - scale * (input_BLF[..., gone_R] @ weight_RD)
            yield Reading(batch, input_BLF[..., keep_K], full_BLD, cut_BLD)


@dataclass(frozen=True)
class GatedReading:
    """One batch: inputs of the up projection, gates, outputs of the cut layer and of its output projection."""

    input_BLI: Tensor
    gates_BLF: Tensor
    output_BLD: Tensor
    written_BLD: Tensor


def read_gated(runs: Reruns, new: int, *, cut: nn.Module, unit: MlpUnit) -> Iterator[GatedReading]:
    """Read by running the cut layer. A gate is its neuron's activation over what its up projection puts out."""
    assert unit.up is not None, "gated"
    name = unit.up.tensor.name
    ups: list[Tensor] = []
    inputs: list[Tensor] = []
    activations: list[Tensor] = []
    written: list[Tensor] = []
    rows_F = slice_rows(cut.get_parameter(name).shape[unit.up.tensor.dim], unit.up)
    with ExitStack() as hooks:
        up = cut.get_submodule(name.rpartition(".")[0])
        hooks.enter_context(inputs_of(up, inputs.append))
        hooks.enter_context(outputs_of(up, ups.append))
        hooks.enter_context(inputs_of(cut.get_submodule(unit.output), activations.append))
        hooks.enter_context(outputs_of(cut.get_submodule(unit.output), written.append))
        for _, hidden_BLD, output_BLD in runs.outputs(new, cut):
            tokens = hidden_BLD.shape[:2]
            up_BLF = ups.pop().view(*tokens, -1)[..., rows_F]
            gates_BLF = (activations.pop().view(*tokens, -1) / up_BLF).nan_to_num_(0, 0, 0)  # of 0: it says nothing
            yield GatedReading(inputs.pop().view(*tokens, -1), gates_BLF, output_BLD, written.pop().view_as(output_BLD))


def read_both(runs: Reruns, new: int, *, uncut: nn.Module, pruned: Decoder, unit: Unit) -> Iterator[Reading]:
    """Read by running the layer uncut and cut, where the difference is more than the unit's neurons."""
    seen: list[Tensor] = []
    written: list[Tensor] = []
    cut = pruned.layers[new]
    pairs = zip(runs.outputs(new, uncut), runs.outputs(new, cut), strict=True)
    with ExitStack() as hooks:
        hooks.enter_context(pruned.layer(new))
        hooks.enter_context(inputs_of(cut.get_submodule(unit.output), seen.append))
        for layer in (uncut, cut):
            hooks.enter_context(outputs_of(layer.get_submodule(unit.output), written.append))
        for (batch, hidden_BLD, full_BLD), (_, _, cut_BLD) in pairs:
            input_BLF = seen.pop().view(*hidden_BLD.shape[:2], -1)
            cut_written, full_written = written.pop(), written.pop()
            yield Reading(
                batch, input_BLF, full_BLD, cut_BLD, full_written.view_as(full_BLD), cut_written.view_as(cut_BLD)
            )


def lost_rows(weight_DF: Tensor, keep_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices of a projection's inputs that are not kept, and their rows [R, D] of the transposed weight."""
    gone_F = torch.ones(weight_DF.shape[1], dtype=torch.bool)
    gone_F[keep_K if keep_K is not None else slice(None)] = False
    gone_R = gone_F.nonzero().squeeze(1)
    return gone_R, weight_DF[:, gone_R].T
