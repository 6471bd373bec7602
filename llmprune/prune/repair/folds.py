"""Folds of the calibration windows: groups that a solve does not see and is judged on.

A fold has the windows of one source, or half of all windows, or every eighth. Windows that the dense model wrote itself
are a fold of their own, with the weight of all that were read, of which there are more: they show what the model knows
beyond the calibration text. SmolLM2 lost less on other text with that weight than with its share of the windows.

Shapes: N windows, L sequence length, G windows that the dense model wrote itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.prune.repair.halves import most_different_halves
from llmprune.recipe.refit import MOST_FOLDS


@dataclass(frozen=True)
class Folds:
    """The fold of each window, int64 [N], and the weight of the windows of each fold.

    ``are_sources``: a fold has the windows of whole sources, not half of the only one. ``generated``: the fold of those
    that the dense model wrote itself; None where it wrote none.
    """

    of_windows_N: Tensor
    weights: tuple[float, ...]
    are_sources: bool = False
    generated: int | None = None

    @classmethod
    def of(cls, windows_NL: Tensor, sources_N: Tensor | None, *, generated_N: Tensor | None = None) -> Folds:
        """Return the folds of token windows: their sources, or with a single source its most different halves.

        ``generated_N``: True for windows that the dense model wrote itself, bool [N]; None where it wrote none.
        """
        if sources_N is None or len(set(sources_N.tolist())) < 2:
            return cls(most_different_halves(windows_NL), (1.0, 1.0))
        if generated_N is None:
            folds_N = sources_N % MOST_FOLDS
            return cls(folds_N, (1.0,) * (int(folds_N.max()) + 1), are_sources=True)
        folds_N = sources_N % (MOST_FOLDS - 1)
        own, generated = int(folds_N[~generated_N].max()) + 1, int(generated_N.sum())
        weight = (len(windows_NL) - generated) / generated
        return cls(folds_N.masked_fill(generated_N, own), (*(1.0,) * own, weight), are_sources=True, generated=own)

    def judging(self, layer: int) -> Tensor:
        """Return True for the windows that judge the training of a kept layer and are not trained on, bool [N].

        They are every second of those that the dense model wrote itself. Without these a source is held out, another
        for the next layer, and of a single source every eighth window. None of a single window.
        """
        if self.generated is not None:
            own_G = (self.of_windows_N == self.generated).nonzero().squeeze(1)
            return torch.zeros(len(self.of_windows_N), dtype=torch.bool).index_fill(0, own_G[::2], True)
        if self.are_sources:
            return self.of_windows_N == layer % len(self.weights)
        return every_eighth(len(self.of_windows_N)).bool()


def every_eighth(windows: int) -> Tensor:
    """Return 1 for every eighth window, or the last of fewer, 0 for the others, int64 [N]. A single one gets 0."""
    held_out_N = torch.arange(windows) % 8 == 7
    if windows > 1 and not held_out_N.any():
        held_out_N[-1] = True
    return held_out_N.long()
