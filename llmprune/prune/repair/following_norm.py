"""Regression targets of a projection whose output a norm follows before it reaches the residual stream.

Families such as Gemma 3, OLMo 2 and GLM-4 add c = norm(y) to the hidden states, y being the output of the projection:

    c = s · g ⊙ y        s = √D / ‖ y ‖ for each token, g the norm's weight

The norm fixes the length of c / g, so that the hidden states can only be led towards those of the dense model by the
direction of y. Where the stream lacks E, the wanted contribution is the one in the direction of c + E that has that
length, c* = g ⊙ √D · u / ‖ u ‖ with u = (c + E) / g. In the unit of c the repair is linear again:

    minimise over Δ   Σ over tokens ‖ g ⊙ (s x Δᵀ) − (c* − c) ‖²

so the regression gets the inputs s x and the targets c* − c, and its solution is divided by g. The dense projection's
own output is no target: to match it undoes what later layers do about an error in their input. A Gemma-3-shaped model
without one of its 6 layers had lost more with such a refit than without any.

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of, outputs_of
from llmprune.anatomy.projections import outputs_of_projection
from llmprune.common.distributed import broadcast_from_first
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.repair.residual_scales import ResidualScales

_LEAST = 1e-20  # of what is divided by
_CLOSE = 0.02  # of the norm's output, between it and what the formula gives
_LEAST_WEIGHT = 1e-3  # of the mean size of g; smaller ones are no divisors


@dataclass(frozen=True)
class FollowingNorm:
    """Norm after a projection; ``weight_D``: g; ``scale``: factor by which c is added to the hidden states."""

    weight_D: Tensor
    scale: float

    def token_factor(self, output_BLD: Tensor) -> Tensor:
        """Return s [B, L, 1] for outputs of the projection."""
        length = output_BLD.shape[-1] ** 0.5
        norm_BL1: Tensor = output_BLD.float().norm(dim=-1, keepdim=True)
        factor_BL1: Tensor = length / norm_BL1.clamp_min(_LEAST)
        return factor_BL1

    def contribution(self, output_BLD: Tensor) -> Tensor:
        """Return c, float32 [B, L, D]."""
        return output_BLD.float() * self.token_factor(output_BLD) * self.weight_D

    def wanted(self, contribution_BLD: Tensor, missing_BLD: Tensor) -> Tensor:
        """Return c* − c where the stream lacks E, float32 [B, L, D]."""
        divisor_D = self._divisor
        direction_BLD = (contribution_BLD + missing_BLD.float() / self.scale) / divisor_D
        direction_BLD = direction_BLD * self.token_factor(direction_BLD)
        return direction_BLD.mul_(divisor_D).sub_(contribution_BLD)

    def for_projection(self, delta_DF: Tensor) -> Tensor:
        """Return the change of the projection's weight from the solution in the unit of c."""
        return delta_DF / self._divisor.unsqueeze(1)

    @property
    def _divisor(self) -> Tensor:
        """g, with no number near 0."""
        least = (_LEAST_WEIGHT * self.weight_D.abs().mean()).clamp_min(_LEAST)
        return self.weight_D.where(self.weight_D.abs() >= least, least)


class FollowingNorms:
    """Norms that follow projections, found once for each class of layer."""

    def __init__(self, scales: ResidualScales) -> None:
        self._scales = scales
        self._paths: dict[tuple[str, str], str | None] = {}

    def of(self, forward: LayerwiseForward, index: int, *, layer: nn.Module, output: str) -> FollowingNorm | None:
        """Return the norm that is called with a projection's output in a layer with its weights.

        None where there is none, it computes something else, or the hidden states do not depend linearly on its output.
        """
        key = type(layer).__name__, output
        if key not in self._paths:
            self._paths[key] = broadcast_from_first(_find(forward, index, layer=layer, output=output))
        path = self._paths[key]
        scale = path and self._scales.measure(forward, index, layer=layer, name=path)
        if not path or not scale:
            return None
        return FollowingNorm(_weight_of(layer.get_submodule(path), layer.get_submodule(output)), scale)


def _find(forward: LayerwiseForward, index: int, *, layer: nn.Module, output: str) -> str | None:
    """Return the path of the norm after a projection, found in a run of the first batch."""
    written: list[Tensor] = []
    seen: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        hooks.enter_context(outputs_of(layer.get_submodule(output), written.append))
        for name, module in layer.named_modules():
            if name and not any(module.children()):
                hooks.enter_context(inputs_of(module, seen.setdefault(name, []).append))
        forward.calls[0][index].run(layer, forward.hidden_states.at(0, forward.decoder.device_of(index)))
    names = [name for name, values in seen.items() if any(value is written[0] for value in values)]
    if len(names) != 1:
        return None
    module, output_BLD = layer.get_submodule(names[0]), written[0]
    norm = FollowingNorm(_weight_of(module, layer.get_submodule(output)), 1.0)
    computed_BLD = module(output_BLD).float()
    error = (norm.contribution(output_BLD) - computed_BLD).norm() / computed_BLD.norm().clamp_min(_LEAST)
    return names[0] if error <= _CLOSE else None


def _weight_of(norm: nn.Module, projection: nn.Module) -> Tensor:
    """Return g, float32 [D]: what the norm makes of ones."""
    weight = next(projection.parameters())
    outputs = outputs_of_projection(projection)
    assert outputs is not None, "it is a projection"
    weight_D: Tensor = norm(torch.ones(1, 1, outputs, dtype=weight.dtype, device=weight.device)).float().flatten()
    return weight_D
