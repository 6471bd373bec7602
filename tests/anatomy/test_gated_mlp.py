"""Up projections of gated MLPs, found by proof."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.gated_mlp import find_up
from llmprune.anatomy.selection import slice_rows
from llmprune.anatomy.types import FusedSlice, MlpUnit, PrunableDim
from llmprune.testing import tiny_model


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("family", "tensor", "parts", "entry"),
    [
        ("llama", "mlp.up_proj.weight", (1,), 0),
        ("gemma2", "mlp.up_proj.weight", (1,), 0),
        ("phi3", "mlp.gate_up_proj.weight", (1, 1), 1),
        ("lfm2", "feed_forward.w3.weight", (1,), 0),
        ("granitemoehybrid", "shared_mlp.input_linear.weight", (1, 1), 1),
    ],
)
def test_the_up_projection_is_found(family: str, tensor: str, parts: tuple[int, ...], entry: int) -> None:
    """The up projection is found under any name, fused or not, and never the gate."""
    units = [unit for units in discover(tiny_model(family).config).units for unit in units if unit.refit]
    assert units
    assert {unit.up for unit in units} == {FusedSlice(PrunableDim(tensor, 0, parts), entry)}


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "nemotron"])
def test_an_mlp_without_gates_has_none(family: str) -> None:
    """MLPs with an activation function alone (GELU, ReLU, its square) have no up projection."""
    assert all(unit.up is None for units in discover(tiny_model(family).config).units for unit in units)


@pytest.mark.parametrize("between", [lambda z: z.clamp(-10, 10), torch.relu, torch.tanh, torch.square, lambda z: z + 1])
def test_an_up_projection_must_enter_the_product_linearly(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Any function of its output counts, even a clamp that small random activations never reach."""
    tensors = {"gate.weight": _normal(8, 4), "up.weight": _normal(8, 4, seed=1), "down.weight": _normal(4, 8, seed=2)}
    prunables = (*(PrunableDim(f"{name}.weight", 0) for name in ("gate", "up")), PrunableDim("down.weight", 1))
    unit = MlpUnit("", prunables, 8, "intermediate_size", 1, None, True)
    x = _normal(1, 16, 4, seed=3)

    def activations(now: dict[str, torch.Tensor], f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.silu(x @ now["gate.weight"].T) * f(x @ now["up.weight"].T)

    assert find_up(unit, tensors, activations=lambda now: activations(now, between)) is None
    assert find_up(unit, tensors, activations=lambda now: activations(now, lambda z: z)) == FusedSlice(
        PrunableDim("up.weight", 0), 0
    )


def test_slices_partition_the_rows() -> None:
    """Each row of a fused dimension is in one slice, in either layout."""
    for parts in ((1,), (1, 1), (2,)):
        prunable = PrunableDim("x", 0, parts)
        rows = [slice_rows(12, FusedSlice(prunable, entry)) for entry in range(sum(parts))]
        assert torch.cat(rows).sort().values.tolist() == list(range(12))
    assert slice_rows(6, FusedSlice(PrunableDim("x", 0, (1, 1)), 1)).tolist() == [3, 4, 5]
    assert slice_rows(6, FusedSlice(PrunableDim("x", 0, (2,)), 1)).tolist() == [1, 3, 5]
