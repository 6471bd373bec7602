"""Seeded random token windows and logits."""

from __future__ import annotations

import math

import torch

from llmprune.testing import VOCABULARY


def windows(count: int = 5, length: int = 24) -> torch.Tensor:
    """Return token windows [N, L]."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def logits_of(seed: int, masked: slice | None = None) -> torch.Tensor:
    """Return logits [3, 5, 64]; the masked entries of the vocabulary are −inf."""
    logits = 3 * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed))
    if masked is not None:
        logits[..., masked] = -math.inf
    return logits
