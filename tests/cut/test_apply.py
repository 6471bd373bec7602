"""Changes of one slice of a fused tensor."""

from __future__ import annotations

import pytest
import torch

from llmprune.anatomy.types import FusedSlice, PrunableDim
from llmprune.cut.apply import add_to_slice


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [0, 1])
def test_only_the_slice_changes(dim: int) -> None:
    """Only the rows of the slice change, in both layouts, and the given tensor is not changed in place."""
    tensor = _normal(6, 4) if dim == 0 else _normal(4, 6)
    before = tensor.clone()
    after = add_to_slice(tensor, FusedSlice(PrunableDim("x", dim, (1, 1)), 1), delta_FI=torch.ones(3, 4))
    assert torch.equal(tensor, before)
    gates, ups = torch.split(after - before, 3, dim=dim)
    assert not gates.any()
    torch.testing.assert_close(ups, torch.ones_like(ups))
