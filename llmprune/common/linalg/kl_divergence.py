"""Kullback–Leibler divergence of next-token distributions, from logits.

    KL(p ‖ q) = Σ p (log p − log q) = Σ [ p (log p − log q) − p + q ]

The second form has no negative term. In float32 the terms of the first form cancel: for two models that are nearly
equal only rounding errors would be left, and the sum could be negative.

A token with p = 0 contributes q, which makes the divergence of a vocabulary entry that both models mask with −inf zero.
A token with p > 0 and q = 0 makes it infinite. NaN stays NaN.

Shapes: V vocabulary, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 2**24  # logits whose terms are in memory at once, in float32


def kl_divergence(p_logits: Tensor, q_logits: Tensor, *, at_once: int = _AT_ONCE) -> Tensor:
    """Return KL(p ‖ q) in nats of each pair of distributions over the last dimension, float32.

    ``at_once``: logits whose terms are in memory together.
    """
    import torch

    vocabulary = p_logits.shape[-1]
    rows = max(at_once // vocabulary, 1)
    parts = zip(
        torch.split(p_logits.reshape(-1, vocabulary), rows),
        torch.split(q_logits.reshape(-1, vocabulary), rows),
        strict=True,
    )
    return torch.cat([_of_rows(p_TV, q_TV) for p_TV, q_TV in parts]).view(p_logits.shape[:-1])


def _of_rows(p_logits_TV: Tensor, q_logits_TV: Tensor) -> Tensor:
    import torch

    log_p_TV, log_q_TV = (logits_TV.float().log_softmax(-1) for logits_TV in (p_logits_TV, q_logits_TV))
    p_TV, q_TV, apart_TV = log_p_TV.exp(), log_q_TV.exp(), log_p_TV - log_q_TV
    near_TV = p_TV * (torch.expm1(-apart_TV) + apart_TV)  # the same sum: q = p exp(log q − log p)
    far_TV = p_TV * apart_TV + (q_TV - p_TV)
    terms_TV = torch.where(apart_TV.abs() < 0.5, near_TV, far_TV)
    return torch.where(p_TV == 0, q_TV, terms_TV).sum(-1)
