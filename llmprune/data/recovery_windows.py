"""Windows of the training after the cut in their order, and held-out windows.

Where all text is used up, the training repeats it: a few epochs cost little against new text, more than four are worth
less and less (arXiv 2305.16264).

Shapes in names: N windows for training, H held-out windows, M windows in the order of the training, L sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from llmprune.data.recovery_text import RecoverySources, hold_out
from llmprune.data.window_sources import SELF_GENERATED, order_of
from llmprune.recipe.recover import Recover

if TYPE_CHECKING:
    from torch import Tensor

MOST_EPOCHS = 4  # that are worth about as much as new text


@dataclass(frozen=True)
class Part:
    """One of several trainings that follow each other on the same text; ``number`` counts from 1."""

    number: int = 1
    of: int = 1


@dataclass(frozen=True)
class RecoveryWindows:
    """Windows of the training in shuffled order, each once, and held-out windows, with their sources.

    ``order_M``: index in ``train_NL`` of each window that the training takes, one after another; a window comes again
    once all others have been taken. ``names``: of the sources that the indices count.
    """

    train_NL: Tensor
    train_sources_N: Tensor
    order_M: Tensor
    held_out_NL: Tensor
    held_out_sources_N: Tensor
    names: tuple[str, ...]
    begin: tuple[int, ...]
    notes: tuple[str, ...]

    def part(self, part: Part) -> RecoveryWindows:
        """Return the windows of one of several trainings that follow each other; all have the same held-out windows."""
        import torch

        if part.of == 1:
            return self
        places = len(self.order_M) // part.of
        own_M = self.order_M[(part.number - 1) * places : part.number * places]
        used_N = torch.tensor(sorted(set(own_M.tolist())))
        return replace(
            self,
            train_NL=self.train_NL[used_N],
            train_sources_N=self.train_sources_N[used_N],
            order_M=torch.searchsorted(used_N, own_M),
        )


def arrange(
    text: RecoverySources, generated_NL: Tensor | None, *, number: int, settings: Recover, seed: int
) -> RecoveryWindows:
    """Return ``number`` windows of a training on text and on windows that the dense model wrote, in their order.

    ``generated_NL``: int64 [G, L], of which as many are held out as of another source.
    """
    import torch

    sources, notes = list(text.sources), list(text.notes)
    if generated_NL is not None and len(generated_NL):
        own, told = hold_out({SELF_GENERATED: generated_NL}, settings, wanted={})
        sources += own
        notes += told
    indices = range(len(sources))
    pool_NL = torch.cat([source.train_NL for source in sources])
    pool_N = torch.cat([torch.full((len(sources[index].train_NL),), index) for index in indices])
    shuffled_N = order_of(len(pool_NL), seed)[:number]
    held_out_NL = torch.cat([source.held_out_HL for source in sources])
    held_out_N = torch.cat([torch.full((len(sources[index].held_out_HL),), index) for index in indices])
    notes += about_epochs(number, available=len(pool_NL), length=pool_NL.shape[1])
    return RecoveryWindows(
        pool_NL[shuffled_N],
        pool_N[shuffled_N],
        _order(len(shuffled_N), number, seed=seed),
        held_out_NL,
        held_out_N,
        tuple(source.name for source in sources),
        text.begin,
        tuple(notes),
    )


def _order(windows: int, places: int, *, seed: int) -> Tensor:
    """Return the window of each place of the training, int64 [places]; each epoch in an order of its own."""
    import torch

    epochs = [torch.arange(windows)]
    epochs += [order_of(windows, (seed + epoch) % 2**32) for epoch in range(1, ceil(places / windows))]
    return torch.cat(epochs)[:places]


def about_epochs(number: int, *, available: int, length: int) -> list[str]:
    """Return a note where a training takes more windows than there are, so that they are repeated."""
    if number <= available:
        return []
    note = (
        f"recover: the text has {available} windows ({available * length:,} tokens) to train on, and each is taken "
        f"{number / available:.1f} times"
    )
    if number <= MOST_EPOCHS * available:
        return [note]
    return [f"{note}; more than {MOST_EPOCHS} times adds little: add text to recover.data, or lower recover.tokens"]
