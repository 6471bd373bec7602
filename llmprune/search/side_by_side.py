"""Divergence of many cuts of one model, which advance side by side: every dense layer is fetched once for all of them.

A cut equals another up to the first layer that only one of them removes, so that they share hidden states until then.
Nothing is repaired.

Shapes: S sources, C cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.anatomy.types import Anatomy
from llmprune.common.progress import track
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.search.judging import Judge

Branch = tuple[int, tuple[int, ...]]  # number of the units' cut, and the layers removed so far


@torch.no_grad()
def divergences(judge: Judge, anatomy: Anatomy, *, cuts: Sequence[Cut]) -> Tensor:
    """Return KL(dense ‖ cut) in nats per token, float64 [S, C], on the windows of a judge."""
    narrowed = _Narrowed(judge, anatomy, cuts=cuts)
    branches: dict[Branch, HiddenStates] = {(number, ()): one.copy() for number, one in enumerate(narrowed.forwards)}
    for index in track(range(len(judge.dense)), "search: shapes side by side"):
        branches = narrowed.pass_layer(index, branches)
    return judge.divergences([branches[branch] for branch in narrowed.ends])


class _Narrowed:
    """Forward passes through the model with each different cut of its units, all layers kept."""

    def __init__(self, judge: Judge, anatomy: Anatomy, *, cuts: Sequence[Cut]) -> None:
        self.cuts = cuts
        self._numbers: list[int] = []
        self.forwards: list[LayerwiseForward] = []
        known: dict[str, int] = {}
        for cut in cuts:
            key = _key(cut)
            if key not in known:
                known[key] = len(known)
                whole = replace(cut, layers=tuple(range(cut.num_layers)))
                own = judge.dense if whole.is_empty else cut_decoder(judge.dense, anatomy=anatomy, cut=whole)
                self.forwards.append(judge.forward(own))
            self._numbers.append(known[key])

    @property
    def ends(self) -> list[Branch]:
        """The branch that each cut ends with."""
        return [(number, cut.removed) for number, cut in zip(self._numbers, self.cuts, strict=True)]

    def pass_layer(self, index: int, branches: dict[Branch, HiddenStates]) -> dict[Branch, HiddenStates]:
        """Return the branches after a layer: with it, and without it where a cut removes it."""
        wanted = {
            (number, tuple(layer for layer in cut.removed if layer <= index))
            for number, cut in zip(self._numbers, self.cuts, strict=True)
        }
        after: dict[Branch, HiddenStates] = {}
        for number, forward in enumerate(self.forwards):
            own = [branch for branch in branches if branch[0] == number]
            passing = [branch for branch in own if branch in wanted]
            skipping = [branch for branch in own if (number, (*branch[1], index)) in wanted]
            for branch in skipping:
                states = branches[branch]
                after[number, (*branch[1], index)] = forward.on(states).copy() if branch in passing else states
            if passing:
                with forward.decoder.layer(index) as layer:
                    for branch in passing:
                        forward.on(branches[branch]).pass_through(index, layer)
                        after[branch] = branches[branch]
        return after


def _key(cut: Cut) -> str:
    """Return a text that is the same for cuts to the same sizes, whose units are then the same."""
    return str((sorted(cut.widths.items()), cut.num_experts, cut.kv_groups))
