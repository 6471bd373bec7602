"""Low-rank adapters of the layers' projections, from peft (LoRA, arXiv 2106.09685), merged into the weights for saving.

The adapters of a sparse matrix act under its zeros: the product of the two factors is formed, and is zero where the
matrix is. Experts that are stacked in one tensor get no adapters.

Shapes: R rank, I inputs, O outputs, X any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.projections import projections_of
from llmprune.recipe.recover import Lora

if TYPE_CHECKING:  # peft imports every quantiser that is installed, which takes seconds and prints
    from peft.tuners.lora import LoraLayer

Tensors = dict[str, Tensor]

_BASE, _LORA = ".base_layer.", ".lora_"  # in names of tensors


def add_adapters(layer: nn.Module, settings: Lora, *, zeros: Mapping[str, Tensor]) -> None:
    """Add float32 adapters to every projection of a layer whose weights are frozen.

    ``zeros``: those of the layer's parameters, by name. The random numbers of the factors are those of torch's global
    generator.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    targets = [projection.name for projection in projections_of(layer)]
    if not targets:
        return
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    inject_adapter_in_model(config, layer)
    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer):
            module.lora_A.float()
            module.lora_B.float()
            zero_X = zeros.get(f"{name}.weight")
            if zero_X is not None:
                module.__dict__["forward"] = _SparseForward(module, zero_X)


@dataclass(frozen=True)
class _SparseForward:
    """Forward of a projection with an adapter under zeros."""

    module: LoraLayer
    zero_X: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        base = self.module.get_base_layer()
        a_RI, b_OR = (
            factors["default"].get_parameter("weight") for factors in (self.module.lora_A, self.module.lora_B)
        )
        delta_OI = _delta(a_RI, b_OR, scale=self.module.scaling["default"])
        zero_OI = self.zero_X.T if isinstance(base, Conv1D) else self.zero_X
        output: Tensor = base(inputs) + linear(inputs, delta_OI.masked_fill(zero_OI, 0.0).to(inputs.dtype))
        return output


def _delta(a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """Return what an adapter adds to the weight [O, I]."""
    return (b_OR @ a_RI) * scale


def merged(tensors: Tensors, layer: nn.Module, *, zeros: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors of a layer with its adapters added to the weights, under their zeros, in the weights' types.

    ``tensors``: those of the layer and of its adapters, by name; ``zeros``: as for ``add_adapters``.
    """
    made = {name.replace(_BASE, "."): value for name, value in tensors.items() if _LORA not in name}
    if len(made) == len(tensors):
        return made
    from peft.tuners.lora import LoraLayer

    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer):
            a_RI, b_OR = (tensors[f"{name}.{part}.default.weight"] for part in ("lora_A", "lora_B"))
            delta_OI = _delta(a_RI, b_OR, scale=module.scaling["default"])
            weight_X = made[f"{name}.weight"]
            delta_X = delta_OI.T if isinstance(module.get_base_layer(), Conv1D) else delta_OI
            zero_X = zeros.get(f"{name}.weight")
            if zero_X is not None:
                delta_X = delta_X.masked_fill(zero_X.to(delta_X.device), 0.0)
            made[f"{name}.weight"] = (weight_X.float() + delta_X).to(weight_X.dtype)
    return made
