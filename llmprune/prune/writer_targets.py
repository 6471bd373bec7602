"""Regression targets of residual writers in a layer that is repaired stage by stage.

    the layer's last residual writer:   the dense hidden states after the layer (and its gap) minus the layer's output
        without it
    an earlier writer (attention):      what makes the pruned residual stream after it equal to the dense one
    a writer that a norm follows:       its own dense output

Shapes: B batch, L sequence length, D hidden size, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.prune.repair.residual_writers import ResidualWriter


@dataclass(frozen=True)
class DenseTargets:
    """Dense activations that residual writers are refit towards.

    ``after``: hidden states after the layer (and its gap). ``outputs``: by writer other than the last, the residual
    stream after it in units of its scale.
    """

    after: HiddenStates
    outputs: dict[str, HiddenStates]


@dataclass(frozen=True)
class WriterTarget:
    """Regression target of a residual writer for one batch, bias subtracted, and the inputs of its projection."""

    batch: int
    input_BLI: Tensor
    target_BLD: Tensor


def targets_of(staged: StagedLayer, writer: ResidualWriter, *, targets: DenseTargets) -> Iterator[WriterTarget]:
    """Yield the inputs and the regression target of a residual writer, batch by batch."""
    forward, device = staged.forward, staged.forward.decoder.device_of(staged.index)
    bias = getattr(staged.layer.get_submodule(writer.name), "bias", None)
    bias_D = None if bias is None else bias.float()
    if writer.is_last:
        assert writer.scale is not None, "no norm follows the last writer"
        for one in staged.without(writer.name, keep=True):
            target_BLD = targets.after.at(one.batch, device).float() - one.output_BLD.float()
            if writer.scale != 1:
                target_BLD /= writer.scale
            input_BLI = one.input_BLI.view(*target_BLD.shape[:2], -1)
            yield WriterTarget(one.batch, input_BLI, _without_bias(target_BLD, bias_D))
        return
    for batch, input_BLI in staged.inputs(writer.name, keep=True):
        target_BLD = targets.outputs[writer.name].at(batch, device).float()
        if writer.scale is not None:
            hidden_BLD = forward.hidden_states.at(batch, device)
            target_BLD = torch.sub(target_BLD, hidden_BLD.float(), alpha=1 / writer.scale)
        yield WriterTarget(batch, input_BLI.view(*target_BLD.shape[:2], -1), _without_bias(target_BLD, bias_D))


def _without_bias(output_BLD: Tensor, bias_D: Tensor | None) -> Tensor:
    return output_BLD if bias_D is None else output_BLD - bias_D
