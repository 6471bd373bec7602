"""Perplexity on held-out windows, layer by layer: no more memory than the walk needs.

Shapes: N windows, B batch, L sequence length, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmprune.model.walk import Decoder, Walk
from llmprune.progress import track


@torch.no_grad()
def perplexity(decoder: Decoder, windows_NL: Tensor, batch_size: int, what: str) -> float:
    """exp of the mean next-token cross entropy over all windows; infinity where that overflows."""
    walk = Walk(decoder, windows_NL, batch_size)
    for index in track(range(len(decoder)), f"perplexity: {what}"):
        with decoder.layer(index) as layer:
            walk.pass_through(index, layer)
    total, count = 0.0, 0
    for batch, ids_BL in enumerate(walk.batches):
        logits_BLV = walk.logits(batch)[:, :-1].float()
        targets = ids_BL[:, 1:].to(logits_BLV.device)
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets.flatten(), reduction="sum")
        total += loss.item()
        count += targets.numel()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf
