"""Held-out text, layer by layer: perplexity, and how far the pruned model's predictions are from the dense one's.

No more memory than the walk needs: hidden states of two models, logits of one batch.

Shapes: N windows, B batch, L sequence length, V vocabulary, T tokens of a batch that are predicted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.common.errors import NumericalError
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.common.progress import track
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.results.schema import DivergenceFigures

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def perplexity(decoder: Decoder, windows_NL: Tensor, *, batch_size: int, what: str) -> float:
    """exp of the mean next-token cross entropy over all windows; infinity where that overflows.

    Raises NumericalError where logits are NaN or infinite.
    """
    walk = _walked(decoder, windows_NL, batch_size=batch_size, what=what)
    losses = [_losses(_logits(walk, batch), walk.batches[batch], what=what) for batch in range(len(walk.batches))]
    return _exp_mean(losses)


def compare_predictions(
    dense: Decoder, pruned: Decoder, *, windows_NL: Tensor, batch_size: int
) -> tuple[float, float, DivergenceFigures]:
    """Perplexity of both, and the Kullback-Leibler divergence KL(dense ‖ pruned) of each next-token distribution.

    Raises NumericalError where logits of either are NaN or infinite.
    """
    decoders = {"dense": dense, "pruned": pruned}
    walks = {what: _walked(decoder, windows_NL, batch_size=batch_size, what=what) for what, decoder in decoders.items()}
    losses: dict[str, list[Tensor]] = {what: [] for what in walks}
    divergences, same = [], 0
    for batch, ids_BL in enumerate(walks["dense"].batches):
        logits = {what: _logits(walk, batch) for what, walk in walks.items()}
        for what, logits_TV in logits.items():
            losses[what].append(_losses(logits_TV, ids_BL, what=what))
        dense_TV = logits["dense"]
        pruned_TV = logits["pruned"].to(dense_TV.device)
        divergences.append(kl_divergence(dense_TV, pruned_TV).cpu())
        same += int((dense_TV.argmax(-1) == pruned_TV.argmax(-1)).sum())
    every_T = torch.cat(divergences).double()
    # torch.quantile takes at most 16 million values; a sort takes any number
    sorted_T = every_T.sort().values
    places = {str(share): min(math.ceil(share * len(sorted_T)), len(sorted_T)) - 1 for share in QUANTILES}
    figures = DivergenceFigures(
        mean=float(every_T.mean()),
        quantiles={share: float(sorted_T[place]) for share, place in places.items()},
        same_first=same / len(every_T),
        tokens=len(every_T),
    )
    return _exp_mean(losses["dense"]), _exp_mean(losses["pruned"]), figures


@torch.no_grad()
def _walked(decoder: Decoder, windows_NL: Tensor, *, batch_size: int, what: str) -> LayerwiseForward:
    """A walk whose streams have left the last layer."""
    walk = LayerwiseForward(decoder, windows_NL, batch_size=batch_size)
    for index in track(range(len(decoder)), f"held-out text: {what}"):
        with decoder.layer(index) as layer:
            walk.pass_through(index, layer)
    return walk


@torch.no_grad()
def _logits(walk: LayerwiseForward, batch: int) -> Tensor:
    """Of every next token, [T, V]."""
    return walk.logits(batch)[:, :-1].flatten(0, 1)


def _losses(logits_TV: Tensor, ids_BL: Tensor, *, what: str) -> Tensor:
    """Next-token cross entropies, float32 [T]. Infinity only where the model rules a token out."""
    targets_T = ids_BL[:, 1:].flatten().to(logits_TV.device)
    losses_T = cross_entropy(logits_TV.float(), targets_T, reduction="none").cpu()
    if losses_T.isnan().any():
        raise NumericalError(
            f"held-out text, {what} model: its logits are NaN or infinite; try model.dtype: float32 or bfloat16, and "
            "check the checkpoint's weights"
        )
    return losses_T


def _exp_mean(losses: list[Tensor]) -> float:
    mean = float(torch.cat(losses).double().mean())
    return math.exp(mean) if mean < 700 else math.inf
