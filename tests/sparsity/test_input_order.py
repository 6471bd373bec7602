"""Orders of inputs for patterns, on single matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity import input_order
from llmprune.sparsity.input_order import best_order
from llmprune.sparsity.pattern import Pattern


def retained(scores_RI: Tensor, pattern: Pattern) -> float:
    """Sum of the scores that a pattern keeps."""
    return float((scores_RI * pattern.mask(scores_RI)).sum())


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_an_order_retains_more(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input occurs once, the pattern keeps more of random scores, and the same again; in several blocks too."""
    monkeypatch.setattr(input_order, "_BLOCK", 5)
    pattern = Pattern.parse(text)
    scores_RI = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) ** 4
    order_I = best_order(scores_RI, pattern=pattern)
    assert sorted(order_I.tolist()) == [*range(64)]
    assert retained(scores_RI[:, order_I], pattern) > 1.01 * retained(scores_RI, pattern)
    assert torch.equal(order_I, best_order(scores_RI, pattern=pattern))


def test_important_inputs_are_spread_over_the_groups() -> None:
    """Where half of the inputs matter and stand side by side, each group gets two of them: nothing is lost."""
    scores_RI = torch.zeros(4, 32)
    scores_RI[:, :16] = 1.0
    order_I = best_order(scores_RI, pattern=Pattern.parse("2:4"))
    assert ((order_I.view(-1, 4) < 16).sum(1) == 2).all()


def test_what_cannot_be_ordered_keeps_its_order() -> None:
    """A single group, and scores that are not finite."""
    assert best_order(torch.rand(3, 4), pattern=Pattern.parse("2:4")).tolist() == [0, 1, 2, 3]
    assert best_order(torch.full((3, 8), torch.nan), pattern=Pattern.parse("2:4")).tolist() == [*range(8)]


def test_a_share_of_weights_has_no_order() -> None:
    """``permute: true`` without groups is refused; by default only patterns with groups are ordered."""
    with pytest.raises(ValueError, match="permute: the order of inputs means nothing"):
        Sparsity.model_validate({"pattern": 0.5, "permute": True})
    assert not Sparsity.model_validate({"pattern": 0.5}).permutes
    assert Sparsity.model_validate({"pattern": "2:4"}).permutes
    assert not Sparsity.model_validate({"pattern": "2:4", "permute": False}).permutes
