"""Most different halves of the calibration windows of a single source, by their tokens.

Windows are sorted by the first principal component of the square roots of their token counts (Hellinger distance), and
split at the median. Windows of one document have words in common, so most of them are in the same half. Nothing but the
tokens is needed: halves by the dense model's likelihood, or by mean hidden states, led to repairs that are no better on
other text. Of windows of four kinds, half of them WikiText, the halves are WikiText and the three others.

Shapes: N windows, L sequence length, V bins of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 4096  # tokens share bins, so that memory does not grow with the vocabulary


def most_different_halves(windows_NL: Tensor) -> Tensor:
    """Return 0 or 1 for each window, int64 [N]: its half. The first window, and the one more of an odd number, get 0.

    Windows that do not differ are split by their order.
    """
    place_N = _first_component(_roots_of_counts(windows_NL)).round(decimals=9)  # no rounding decides between equals
    if place_N[0] > 0:
        place_N = -place_N
    second = place_N.argsort(stable=True)[(len(windows_NL) + 1) // 2 :]
    return torch.zeros(len(windows_NL), dtype=torch.int64).index_fill(0, second, 1)


def _roots_of_counts(windows_NL: Tensor) -> Tensor:
    """Return the square roots of the counts of each window's tokens, float64 [N, V]."""
    counts_NV = torch.zeros(len(windows_NL), _BINS, dtype=torch.float64)
    return counts_NV.scatter_add_(1, windows_NL % _BINS, torch.ones(windows_NL.shape, dtype=torch.float64)).sqrt_()


def _first_component(features_NV: Tensor) -> Tensor:
    """Return the place of each window along the first principal component [N]; zeros where windows do not differ."""
    features_NV = features_NV - features_NV.mean(0)
    values_N, vectors_NN = torch.linalg.eigh(features_NV @ features_NV.T)
    place_N: Tensor = vectors_NN[:, -1] * values_N[-1].clamp_min(0).sqrt()
    return place_N
