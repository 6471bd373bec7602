"""Block influence: one minus the mean cosine between hidden states before and after a layer."""

from __future__ import annotations

import pytest
import torch

from llmprune.criteria.depth.block_influence import BlockInfluence


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    """Batches of any size add up to the definition over all tokens."""
    before, after = _normal(6, 5, 8), _normal(6, 5, 8, seed=1)
    accumulator = BlockInfluence().make_accumulator(torch.device("cpu"))
    for part in (slice(0, 4), slice(4, 6)):
        accumulator.update(before[part], after[part])
    expected = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    torch.testing.assert_close(accumulator.score(), expected)


def test_a_layer_that_changes_nothing_has_no_influence() -> None:
    """The identity scores 0, a reversal scores 2."""
    hidden = _normal(2, 3, 4)
    for output, expected in ((hidden, 0.0), (-hidden, 2.0)):
        accumulator = BlockInfluence().make_accumulator(torch.device("cpu"))
        accumulator.update(hidden, output)
        assert float(accumulator.score()) == pytest.approx(expected, abs=1e-6)
