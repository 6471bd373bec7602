"""KL divergence of next-token distributions, against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.random_inputs import logits_of

from llmprune.common.linalg.kl_divergence import kl_divergence


def reference(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """Return KL(p ‖ q) in float64, term by term by its definition; no term where p is 0."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (p_logits, q_logits))
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def test_identical_distributions_have_no_divergence() -> None:
    """Exactly 0, also with masked vocabulary entries; near 0 if the logits differ by a constant."""
    for masked in (None, slice(40, 64)):
        logits = logits_of(0, masked)
        assert torch.equal(kl_divergence(logits, logits), torch.zeros(3, 5))
        assert kl_divergence(logits, logits + 7).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_divergence_is_right_in_float32(scale: float) -> None:
    """Divergences of nearly equal distributions are accurate and positive."""
    p_logits = logits_of(0)
    q_logits = p_logits + scale * torch.randn(p_logits.shape, generator=torch.Generator().manual_seed(1))
    found = kl_divergence(p_logits, q_logits)
    assert found.dtype == torch.float32
    assert (found > 0).all()
    torch.testing.assert_close(found.double(), reference(p_logits, q_logits), rtol=5e-3, atol=0)


def test_divergence_counts_masked_entries_by_who_masks_them() -> None:
    """Masked by both or by p only: finite. By q only: infinite. Vanishing probabilities give no NaN."""
    p, both, q = logits_of(0), slice(40, 64), logits_of(1)
    p_masked, q_masked = logits_of(0, both), logits_of(1, both)
    for other in (q_masked, q):
        torch.testing.assert_close(kl_divergence(p_masked, other), reference(p_masked, other).float())
    assert (kl_divergence(p, q_masked) == math.inf).all()
    far = torch.tensor([[0.0, -200.0, -math.inf]])
    assert kl_divergence(far, torch.tensor([[0.0, -math.inf, -math.inf]])).tolist() == [0.0]
    assert kl_divergence(far, torch.tensor([[-200.0, 0.0, 0.0]])).isfinite().all()
    assert kl_divergence(torch.tensor([[0.0, torch.nan]]), torch.zeros(1, 2)).isnan().all()


def test_divergence_does_not_depend_on_the_rows_at_once() -> None:
    """The rows that are computed at once change memory only."""
    whole = kl_divergence(logits_of(0), logits_of(1))
    for at_once in (1, 64 * 4):
        assert torch.equal(kl_divergence(logits_of(0), logits_of(1), at_once=at_once), whole)
