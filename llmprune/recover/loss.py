"""Distillation loss and its gradient in closed form, from the most likely tokens of the dense model.

The dense model's distribution p is known at its K most likely tokens; all others are one class, with probability r. For
logits z of the pruned model, their softmax π, and ρ = π of the other tokens together:

    loss = Σ_K p (log p − log π) + r (log r − log ρ)
    ∂ loss / ∂ z = π − p at the K tokens, π (1 − r / ρ) at the others

With K = 1, p = 1 and r = 0 this is the cross entropy of a text. The closed form needs one copy of the logits, where
automatic differentiation keeps several. At temperature τ, z / τ takes the place of z, and the loss is multiplied by τ²,
so that its gradient keeps its size (Hinton et al., arXiv 1503.02531).

Shapes: T tokens, V vocabulary, K tokens whose probability is known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 2**23  # logits that are in memory in float32 at once
_LEAST = 1e-6  # of a probability that is divided by: smaller ones are lost in the rounding of a sum


class Targets(NamedTuple):
    """Log probabilities of the dense model at some tokens, and of all other tokens together; −inf where there are none.

    ``log_p_TK`` float, ``ids_TK`` integer, ``log_r_T`` float.
    """

    log_p_TK: Tensor
    ids_TK: Tensor
    log_r_T: Tensor

    @classmethod
    def of_text(cls, ids_T: Tensor) -> Targets:
        """Return the targets of cross entropy: each token is certain."""
        zeros_T = torch.zeros(len(ids_T), device=ids_T.device)
        return cls(zeros_T[:, None], ids_T[:, None], zeros_T - torch.inf)

    @classmethod
    def of_logits(cls, logits_TV: Tensor, top_k: int, *, temperature: float = 1.0) -> Targets:
        """Return the ``top_k`` most likely tokens of some logits; all where the vocabulary has no more."""
        log_p_TV = (logits_TV.float() / temperature).log_softmax(-1)
        log_p_TK, ids_TK = log_p_TV.topk(min(top_k, log_p_TV.shape[-1]), dim=-1)
        return cls(log_p_TK, ids_TK, (1 - log_p_TK.exp().sum(-1)).clamp_min(0.0).log())


def distillation_loss(logits_TV: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """Return the loss of each token in nats, float32 [T]; its gradient has the type of the logits."""
    losses_T: Tensor = _Distillation.apply(logits_TV, *targets, temperature)
    return losses_T


class _Distillation(torch.autograd.Function):
    """The loss of each token. The gradient takes the memory of the logits: nothing else may read them afterwards."""

    @staticmethod
    def forward(  # noqa: PLR0917  # the signature is torch's
        ctx: Any, logits_TV: Tensor, log_p_TK: Tensor, ids_TK: Tensor, log_r_T: Tensor, temperature: float
    ) -> Tensor:
        gradient_TV = logits_TV.detach() if ctx.needs_input_grad[0] else None
        rows = max(_AT_ONCE // logits_TV.shape[-1], 1)
        parts = [torch.split(value, rows) for value in (logits_TV, log_p_TK, ids_TK, log_r_T)]
        losses = []
        for start, (z_tV, log_p_tK, ids_tK, log_r_t) in zip(
            range(0, len(logits_TV), rows), zip(*parts, strict=True), strict=True
        ):
            targets = Targets(log_p_tK.float(), ids_tK.long(), log_r_t.float())
            loss_t, gradient_tV = _of_rows(z_tV.float() / temperature, targets)
            losses.append(loss_t * temperature**2)
            if gradient_TV is not None:
                gradient_TV[start : start + len(z_tV)] = gradient_tV * temperature
        ctx.gradient_TV = gradient_TV
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient_TV, ctx.gradient_TV = ctx.gradient_TV, None
        return gradient_TV.mul_(grads[0][:, None].to(gradient_TV.dtype)), None, None, None, None


def _of_rows(z_TV: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return losses [T] and their gradients [T, V]."""
    log_p_TK, ids_TK, log_r_T = targets
    p_TK, r_T = log_p_TK.exp(), log_r_T.exp()
    log_pi_TV = z_TV.log_softmax(-1)
    log_pi_TK = log_pi_TV.gather(-1, ids_TK)
    pi_TV = log_pi_TV.exp_()
    pi_TK = pi_TV.gather(-1, ids_TK)
    rho_T = (1 - pi_TK.sum(-1)).clamp_min(_LEAST)
    loss_T = (p_TK * (log_p_TK - log_pi_TK)).sum(-1)
    loss_T += torch.where(r_T > 0, r_T * (log_r_T - rho_T.log()), 0.0)
    gradient_TV = pi_TV.mul_((1 - r_T / rho_T)[:, None])
    return loss_T, gradient_TV.scatter_(-1, ids_TK, pi_TK - p_TK)
