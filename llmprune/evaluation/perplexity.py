"""Perplexity and divergence of next-token distributions on held-out text, by layer-wise forward passes.

Memory: one layer, the hidden states of two models, and the logits of one batch.

Shapes: N windows, B batch, L sequence length, V vocabulary, T predicted tokens of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.common.errors import NumericalError
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.common.progress import track
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.results.evaluation_figures import DivergenceFigures

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class ComparedPredictions:
    """Perplexity of both models, and the divergence of their next-token distributions."""

    dense_perplexity: float
    pruned_perplexity: float
    divergence: DivergenceFigures


def perplexity(decoder: Decoder, windows_NL: Tensor, *, batch_size: int, name: str) -> float:
    """Return exp of the mean next-token cross entropy over all windows; infinity if that overflows.

    ``name`` identifies the model in messages. Raises NumericalError if logits are NaN or infinite.
    """
    forward = _completed_forward(decoder, windows_NL, batch_size=batch_size, name=name)
    losses = [
        _losses(_next_token_logits(forward, batch), ids_BL, name=name) for batch, ids_BL in enumerate(forward.batches)
    ]
    return _exp_mean(losses)


def compare_predictions(dense: Decoder, pruned: Decoder, *, windows_NL: Tensor, batch_size: int) -> ComparedPredictions:
    """Return the perplexity of both models, and KL(dense ‖ pruned) over all next-token distributions.

    Raises NumericalError if logits of either model are NaN or infinite.
    """
    decoders = {"dense": dense, "pruned": pruned}
    forwards = {
        name: _completed_forward(decoder, windows_NL, batch_size=batch_size, name=name)
        for name, decoder in decoders.items()
    }
    losses: dict[str, list[Tensor]] = {name: [] for name in forwards}
    divergences, same_first = [], 0
    for batch, ids_BL in enumerate(forwards["dense"].batches):
        logits = {name: _next_token_logits(forward, batch) for name, forward in forwards.items()}
        for name, logits_TV in logits.items():
            losses[name].append(_losses(logits_TV, ids_BL, name=name))
        dense_TV = logits["dense"]
        pruned_TV = logits["pruned"].to(dense_TV.device)
        divergences.append(kl_divergence(dense_TV, pruned_TV).cpu())
        same_first += int((dense_TV.argmax(-1) == pruned_TV.argmax(-1)).sum())
    return ComparedPredictions(
        _exp_mean(losses["dense"]),
        _exp_mean(losses["pruned"]),
        _divergence_figures(torch.cat(divergences).double(), same_first),
    )


def _divergence_figures(divergences_T: Tensor, same_first: int) -> DivergenceFigures:
    # torch.quantile accepts at most 16 million values
    sorted_T = divergences_T.sort().values
    indices = {str(share): min(math.ceil(share * len(sorted_T)), len(sorted_T)) - 1 for share in QUANTILES}
    return DivergenceFigures(
        mean=float(divergences_T.mean()),
        quantiles={share: float(sorted_T[index]) for share, index in indices.items()},
        same_first=same_first / len(divergences_T),
        tokens=len(divergences_T),
    )


@torch.no_grad()
def _completed_forward(decoder: Decoder, windows_NL: Tensor, *, batch_size: int, name: str) -> LayerwiseForward:
    """Return a layer-wise forward pass that has completed all layers."""
    forward = LayerwiseForward(decoder, windows_NL, batch_size=batch_size)
    for index in track(range(len(decoder)), f"held-out text: {name}"):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    return forward


@torch.no_grad()
def _next_token_logits(forward: LayerwiseForward, batch: int) -> Tensor:
    """Return the logits of a batch at all positions but the last, [T, V]."""
    return forward.logits(batch)[:, :-1].flatten(0, 1)


def _losses(logits_TV: Tensor, ids_BL: Tensor, *, name: str) -> Tensor:
    """Return next-token cross entropies, float32 [T]; infinity only for tokens that the model masks."""
    targets_T = ids_BL[:, 1:].flatten().to(logits_TV.device)
    losses_T = cross_entropy(logits_TV.float(), targets_T, reduction="none").cpu()
    if losses_T.isnan().any():
        raise NumericalError(
            f"held-out text, {name} model: its logits are NaN or infinite; try model.dtype: float32 or bfloat16, and "
            "check the checkpoint's weights"
        )
    return losses_T


def _exp_mean(losses: list[Tensor]) -> float:
    mean = float(torch.cat(losses).double().mean())
    return math.exp(mean) if mean < 700 else math.inf
