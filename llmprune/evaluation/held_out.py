"""Held-out text, layer by layer: perplexity, and how far the pruned model's predictions are from the dense one's.

No more memory than the walk needs: hidden states of two models, logits of one batch.

Shapes: N windows, B batch, L sequence length, V vocabulary, T tokens of a batch that are predicted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmprune.model.walk import Decoder, Walk
from llmprune.progress import track
from llmprune.report.value import DivergenceFigures

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def perplexity(decoder: Decoder, windows_NL: Tensor, batch_size: int, what: str) -> float:
    """exp of the mean next-token cross entropy over all windows; infinity where that overflows."""
    walk = _walked(decoder, windows_NL, batch_size, what)
    losses = [_losses(walk, batch) for batch in range(len(walk.batches))]
    return _exp_mean(losses)


def compare_predictions(
    dense: Decoder, pruned: Decoder, windows_NL: Tensor, batch_size: int
) -> tuple[float, float, DivergenceFigures]:
    """Perplexity of both, and the Kullback-Leibler divergence KL(dense ‖ pruned) of each next-token distribution."""
    walks = [_walked(decoder, windows_NL, batch_size, what) for decoder, what in ((dense, "dense"), (pruned, "pruned"))]
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    divergences, same = [], 0
    for batch in range(len(walks[0].batches)):
        dense_TV, pruned_TV = (_log_probabilities(walk, batch) for walk in walks)
        for found, log_TV in zip(losses, (dense_TV, pruned_TV), strict=True):
            found.append(_loss_of(log_TV, walks[0].batches[batch]))
        pruned_TV = pruned_TV.to(dense_TV.device)
        divergences.append(_divergence(dense_TV, pruned_TV).cpu())
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
    return _exp_mean(losses[0]), _exp_mean(losses[1]), figures


@torch.no_grad()
def _walked(decoder: Decoder, windows_NL: Tensor, batch_size: int, what: str) -> Walk:
    """A walk whose streams have left the last layer."""
    walk = Walk(decoder, windows_NL, batch_size)
    for index in track(range(len(decoder)), f"held-out text: {what}"):
        with decoder.layer(index) as layer:
            walk.pass_through(index, layer)
    return walk


@torch.no_grad()
def _log_probabilities(walk: Walk, batch: int) -> Tensor:
    """Of every next token, float32 [T, V]."""
    return walk.logits(batch)[:, :-1].float().flatten(0, 1).log_softmax(-1)


def _losses(walk: Walk, batch: int) -> Tensor:
    return _loss_of(_log_probabilities(walk, batch), walk.batches[batch])


def _loss_of(log_TV: Tensor, ids_BL: Tensor) -> Tensor:
    """Next-token cross entropies, float32 [T]."""
    targets_T = ids_BL[:, 1:].flatten().to(log_TV.device)
    return -log_TV.gather(1, targets_T[:, None])[:, 0].cpu()


def _divergence(dense_TV: Tensor, pruned_TV: Tensor) -> Tensor:
    """KL(dense ‖ pruned) [T]: 0 exactly where both are the same, never below."""
    terms_TV = dense_TV.exp() * (dense_TV - pruned_TV)
    return terms_TV.nan_to_num(nan=0.0, posinf=math.inf).sum(-1).clamp_min(0)


def _exp_mean(losses: list[Tensor]) -> float:
    mean = float(torch.cat(losses).double().mean())
    return math.exp(mean) if mean < 700 else math.inf
