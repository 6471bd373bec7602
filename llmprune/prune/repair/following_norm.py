"""Regression targets of a projection whose output a norm follows before it reaches the residual stream.

Families such as Gemma 3, OLMo 2 and GLM-4 add c = norm(y) to the hidden states, y being the output of the projection:

    c = s · g ⊙ y        s = √D / ‖ y ‖ for each token, g the norm's weight

The norm fixes the length of c / g, so that a repair can only turn the direction of y. Where c lacks E, the wanted
contribution is the nearest that the norm can give:

    c* = g ⊙ u        u minimises ‖ g ⊙ u − (c + E) ‖² where ‖ u ‖ = √D,  so  u = g ⊙ (c + E) / (g² + μ)

with the μ ≥ 0 at which u has its length; where it is too short without μ, it is scaled. In the unit of c the repair is
linear again:

    minimise over Δ   Σ over tokens ‖ g ⊙ (s x Δᵀ) − (c* − c) ‖²

so the regression gets the inputs s x and the targets c* − c, and its solution is divided by g. For an MLP the targets
are divided by g before: a channel with a large g would alone decide about the ridge.

In front of removed layers an MLP lacks what its cut took from c. It is not to make up for the error of the hidden
states before it: Gemma 3 with 270 M parameters has one channel with nine tenths of their energy, which its norms hardly
read, and lost more text with such a repair than without any. At and behind removed layers, where most is missing, MLPs
and token mixers are led towards the dense hidden states.

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import outputs_of
from llmprune.anatomy.projections import outputs_of_projection
from llmprune.common.distributed import broadcast_from_first
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.repair.residual_scales import ResidualScales

_LEAST = 1e-20  # of what is divided by
_CLOSE = 0.02  # of the norm's output, between it and what the formula gives
_STEPS = 8  # more change nothing
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

    def residual_after(self, hidden_BLD: Tensor, output: Tensor) -> Tensor:
        """Return the residual stream after the norm, float32 [B, L, D]; ``hidden_BLD``: that before the layer."""
        return hidden_BLD.float() + self.scale * self.contribution(output.view_as(hidden_BLD))

    def wanted(self, contribution_BLD: Tensor, missing_BLD: Tensor) -> Tensor:
        """Return c* − c where the hidden states lack E, float32 [B, L, D]."""
        weight_D, length = self._divisor, contribution_BLD.shape[-1] ** 0.5
        product_BLD = weight_D * (contribution_BLD + missing_BLD.float() / self.scale)
        square_D = weight_D.square()
        multiplier_BL1 = product_BLD.new_zeros(*product_BLD.shape[:-1], 1)
        for _ in range(_STEPS):  # Newton's method for 1 / ‖u‖ = 1 / √D, which rises to the solution
            divisor_BLD = square_D + multiplier_BL1
            direction_BLD = product_BLD / divisor_BLD
            norm_BL1 = direction_BLD.norm(dim=-1, keepdim=True)
            slope_BL1 = (direction_BLD.square() / divisor_BLD).sum(-1, keepdim=True).clamp_min(_LEAST)
            step_BL1 = (norm_BL1 / length - 1) * norm_BL1.square() / slope_BL1
            multiplier_BL1 = (multiplier_BL1 + step_BL1).clamp_min(0)
        direction_BLD = product_BLD / (square_D + multiplier_BL1)
        return weight_D * direction_BLD * self.token_factor(direction_BLD) - contribution_BLD

    def direction(self, contribution_BLD: Tensor) -> Tensor:
        """Return u = c / g, in which all channels are alike."""
        return contribution_BLD / self._divisor

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

    def of(
        self, forward: LayerwiseForward, index: int, *, layer: nn.Module, output: str, later: Sequence[str] = ()
    ) -> FollowingNorm | None:
        """Return the norm that is called with a projection's output in a layer with its weights.

        None where there is none, it computes something else, or the hidden states do not depend linearly on its output
        without the modules that write ``later``.
        """
        key = type(layer).__name__, output
        if key not in self._paths:
            self._paths[key] = broadcast_from_first(_find(forward, index, layer=layer, output=output))
        path = self._paths[key]
        scale = path and self._scales.measure(forward, index, layer=layer, name=path, zeroed=later)
        if not path or not scale:
            return None
        return FollowingNorm(_weight_of(layer.get_submodule(path), layer.get_submodule(output)), scale)


def _find(forward: LayerwiseForward, index: int, *, layer: nn.Module, output: str) -> str | None:
    """Return the path of the norm after a projection, found in a run of the first batch."""
    written: list[Tensor] = []
    names: list[str] = []

    def see(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], *, name: str) -> None:
        if written and len(args) == 1 and not kwargs and args[0] is written[0]:
            names.append(name)

    with ExitStack() as hooks:
        hooks.enter_context(outputs_of(layer.get_submodule(output), written.append))
        for name, module in layer.named_modules():
            if name and not any(module.children()):
                hooks.callback(module.register_forward_pre_hook(partial(see, name=name), with_kwargs=True).remove)
        forward.calls[0][index].run(layer, forward.hidden_states.at(0, forward.decoder.device_of(index)))
    if len(names) != 1:
        return None
    module, output_BLD = layer.get_submodule(names[0]), written[0]
    computed_BLD = module(output_BLD).float()
    if computed_BLD.shape != output_BLD.shape:
        return None
    norm = FollowingNorm(_weight_of(module, layer.get_submodule(output)), 1.0)
    error = (norm.contribution(output_BLD) - computed_BLD).norm() / computed_BLD.norm().clamp_min(_LEAST)
    return names[0] if error <= _CLOSE else None


def _weight_of(norm: nn.Module, projection: nn.Module) -> Tensor:
    """Return g, float32 [D]: what the norm makes of ones."""
    weight = next(projection.parameters())
    outputs = outputs_of_projection(projection)
    assert outputs is not None, "it is a projection"
    weight_D: Tensor = norm(torch.ones(1, 1, outputs, dtype=weight.dtype, device=weight.device)).float().flatten()
    return weight_D
