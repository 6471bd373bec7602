"""Speed of a model's 2:4 matrices with dense and with sparse GPU kernels (``llmprune bench --sparse``).

The matrices are converted with torch's ``to_sparse_semi_structured`` and compared with the same matrices stored dense:
each shape for several numbers of tokens, then the whole model.

Shapes: T tokens, O outputs of a matrix, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmprune.anatomy.meta_model import find_layers
from llmprune.anatomy.projections import Projection, projections_of
from llmprune.common.errors import ModelError, RecipeError
from llmprune.results.figures.bench import SparseProduct
from llmprune.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PATTERN = Pattern(2, 4)
_TYPES = (torch.float16, torch.bfloat16)
_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest output, for another order of summation


def require_gpu() -> None:
    """Raise RecipeError if there is no GPU that torch has sparse kernels for."""
    if not torch.cuda.is_available():
        raise RecipeError(
            "--sparse: this machine has no CUDA GPU, and torch has 2:4 kernels for no other device; here 2:4 matrices "
            "are as slow as dense ones. Run it on an NVIDIA GPU of compute capability 8.0 or later"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        raise RecipeError(
            f"--sparse: {torch.cuda.get_device_name()} has no sparse tensor cores; use a GPU of compute capability 8.0 "
            "(A100) or later"
        )


def sparse_projections(model: PreTrainedModel) -> dict[str, Projection]:
    """Return the projections of the model's layers whose weights are 2:4, by full name.

    Raises ModelError if there are none, or if the kernels do not support the weights' dtype.
    """
    if model.dtype not in _TYPES:
        raise ModelError(f"torch runs 2:4 in float16 and bfloat16, and the model is in {model.dtype}; give --dtype")
    path, layers = find_layers(model)
    found = {
        f"{path}.{index}.{projection.name}": projection
        for index, layer in enumerate(layers)
        for projection in projections_of(layer)
        if _is_sparse(layer.get_submodule(projection.name), projection)
    }
    if not found:
        raise ModelError(
            "no matrix of this model's layers is 2:4; prune it with sparsity: {pattern: '2:4'} in the recipe"
        )
    return found


def _is_sparse(module: nn.Module, projection: Projection) -> bool:
    if projection.transposed or _PATTERN.refusal(projection.outputs, projection.inputs):
        return False
    weight_OI: Tensor = module.get_parameter("weight")
    return bool(((weight_OI != 0).reshape(-1, 4).sum(1) <= 2).all())


def converted(model: PreTrainedModel, names: Sequence[str]) -> PreTrainedModel:
    """Return a copy of the model with these matrices in the compressed form for sparse tensor cores."""
    sparse = copy.deepcopy(model)
    for name in names:
        module = sparse.get_submodule(name)
        module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight.data), requires_grad=False)
    return sparse


def saved_bytes(sparse: PreTrainedModel, names: Sequence[str]) -> int:
    """Return the bytes that the compressed form saves: half of the values, less the indices of the others."""
    saved = 0
    for name in names:
        weight = sparse.get_submodule(name).get_parameter("weight")
        kept = [part for part in (getattr(weight, "packed", None), getattr(weight, "meta", None)) if part is not None]
        saved += weight.numel() * weight.itemsize - sum(part.nbytes for part in kept)
    return saved


@torch.inference_mode()
def time_products(
    model: PreTrainedModel, projections: dict[str, Projection], *, tokens: Sequence[int], repeats: int
) -> tuple[SparseProduct, ...]:
    """Time the first matrix of each shape for each number of tokens, with dense and with sparse kernels.

    Raises ModelError if the outputs differ by more than rounding.
    """
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, projection in projections.items():
        shapes.setdefault((projection.outputs, projection.inputs), []).append(name)
    products = []
    for (outputs, inputs), names in sorted(shapes.items()):
        dense_OI = model.get_submodule(names[0]).get_parameter("weight").data
        sparse_OI = torch.sparse.to_sparse_semi_structured(dense_OI)
        for count in tokens:
            generator = torch.Generator(dense_OI.device).manual_seed(0)
            input_TI = torch.randn(count, inputs, generator=generator, device=dense_OI.device, dtype=dense_OI.dtype)
            difference = _difference(input_TI, dense_OI, sparse_OI=sparse_OI)
            if difference > _TOLERANCE[dense_OI.dtype]:
                raise ModelError(
                    f"{names[0]}: the sparse product differs by {difference:.2g} of its largest output from the "
                    "dense product; update torch and the GPU's driver"
                )
            milliseconds = [_milliseconds(input_TI, weight_OI, repeats=repeats) for weight_OI in (dense_OI, sparse_OI)]
            products.append(
                SparseProduct(
                    outputs=outputs,
                    inputs=inputs,
                    matrices=len(names),
                    tokens=count,
                    dense=milliseconds[0],
                    sparse=milliseconds[1],
                    difference=difference,
                )
            )
    return tuple(products)


def _difference(input_TI: Tensor, dense_OI: Tensor, *, sparse_OI: Tensor) -> float:
    expected_TO = nn.functional.linear(input_TI, dense_OI).float()
    found_TO = nn.functional.linear(input_TI, sparse_OI).float()
    return float((found_TO - expected_TO).abs().max() / expected_TO.abs().max().clamp_min(1e-30))


def _milliseconds(input_TI: Tensor, weight_OI: Tensor, *, repeats: int, calls: int = 20) -> float:
    """Return the median time of one product over the repeats, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(calls):
            nn.functional.linear(input_TI, weight_OI)
        torch.cuda.synchronize()
        times.append((perf_counter() - start) * 1000 / calls)
    return median(times[1:])
