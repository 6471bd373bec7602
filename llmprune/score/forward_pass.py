"""Pass 1: walk the dense model once; every layer, neuron, attention head and expert gets its scores on the way.

Criteria by gradients score on the way back.

Shapes: N layers, B batch, L sequence length, D hidden size, F neurons of a unit, R runs of layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.common.distributed import share_of, sum_over_processes
from llmprune.common.errors import CalibrationError, NumericalError
from llmprune.common.progress import track
from llmprune.criteria.base import ExpertCriterion, PassingCriterion, WidthCriterion
from llmprune.cut.layer_choice import starts_in_pattern
from llmprune.layerwise.backward import LayerwiseBackward
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStates, HiddenStateStore
from llmprune.score.scorers import ExpertsOfLayer, Neurons, StackedNeurons, projections
from llmprune.score.scores import Scores

_Part = Neurons | StackedNeurons | ExpertsOfLayer


def score(
    decoder: Decoder,
    anatomy: Anatomy,
    *,
    windows_NL: Tensor,
    batch_size: int,
    depth: PassingCriterion | None,
    width: WidthCriterion | None,
    experts: ExpertCriterion | None = None,
    store: HiddenStateStore = HiddenStateStore(),  # noqa: B008  # frozen
    remove: int = 1,
    heads: WidthCriterion | None = None,
    keep_pattern: bool = False,
) -> Scores:
    """Scores by whichever criteria are given, in one walk; over several processes, the same in each.

    ``width`` scores the MLPs' neurons, ``heads`` the attention's key-value groups. ``remove``: how many layers go.
    ``keep_pattern``: only runs of layers that leave the others in the model's pattern count.
    """
    criterion = width or heads
    backwards = criterion if criterion and criterion.takes != "activations" else None
    if backwards:
        _require_trail(backwards, store)
    walk = LayerwiseForward(decoder, share_of(windows_NL), batch_size=batch_size, store=store)
    runs = _Runs(depth, depth.horizon(remove), walk=walk) if depth else None
    scores = Scores(None, {})
    for index in track(range(len(decoder)), "pass 1: scoring layers"):
        with decoder.layer(index) as layer:
            forwards = (None, None) if backwards else (width, heads)
            _visit(
                index,
                layer,
                walk=walk,
                runs=runs,
                parts=_parts(index, layer, anatomy=anatomy, width=forwards[0], heads=forwards[1], experts=experts),
                scores=scores,
            )
            if store.cache is not None:
                store.cache.keep(index, walk.streams)
    if backwards and store.cache is not None:
        back = LayerwiseBackward(walk, store.cache, relative=backwards.takes == "relative effects")
        _score_backwards(back, anatomy, width=width, heads=heads, scores=scores)
    starts = starts_in_pattern(anatomy, runs.span) if runs and keep_pattern and runs.span > 1 else None
    scores = replace(scores, layers=runs.scores(len(decoder), starts) if runs else None)
    _require_finite(scores)
    return scores


def _parts(
    index: int,
    layer: nn.Module,
    *,
    anatomy: Anatomy,
    width: WidthCriterion | None,
    heads: WidthCriterion | None,
    experts: ExpertCriterion | None,
) -> list[_Part]:
    """What is scored of one layer."""
    parts: list[_Part] = [*projections(layer, anatomy, index=index, width=width, heads=heads)]
    block = anatomy.blocks[index]
    if experts and block and anatomy.experts:
        parts.append(
            ExpertsOfLayer(
                unit_key(index, block.path), block, count=anatomy.experts.count, layer=layer, criterion=experts
            )
        )
    return parts


def _visit(
    index: int, layer: nn.Module, *, walk: LayerwiseForward, runs: _Runs | None, parts: Sequence[_Part], scores: Scores
) -> None:
    """Take every batch through one layer, and write what its parts score; they go with it, for they hold weights."""
    with ExitStack() as hooks:
        for part in parts:
            part.watch(hooks)
        if runs:
            runs.open(walk.decoder.device_of(index))
        for batch, hidden_BLD, output_BLD in walk.outputs(index, layer):
            if runs:
                runs.update(batch, hidden_BLD, output_BLD=output_BLD)
            walk.advance(batch, output_BLD)
        if runs:
            runs.close()
        for part in parts:
            part.write(scores)


class _Runs:
    """Every run of ``span`` neighbouring layers, each scored when its last layer is visited."""

    def __init__(self, criterion: PassingCriterion, span: int, *, walk: LayerwiseForward) -> None:
        self.criterion, self.span, self.walk = criterion, span, walk
        self.starts: deque[HiddenStates] = deque(maxlen=span)  # before the layers of the run; of one layer, at hand
        self.found: list[Tensor] = []

    def open(self, device: torch.device) -> None:
        """Start with one layer."""
        if self.span > 1:
            self.starts.append(self.walk.copy(self.criterion.looks_at))
        self.sums = self.criterion.open(device)

    def update(self, batch: int, hidden_BLD: Tensor, *, output_BLD: Tensor) -> None:
        """Take in a batch of the layer, the last one of a run."""
        tokens = self.criterion.looks_at
        if self.span == 1:
            self.sums.update(hidden_BLD[:, tokens], output_BLD[:, tokens])
        elif len(self.starts) == self.span:
            self.sums.update(self.starts[0][batch].to(output_BLD.device), output_BLD[:, tokens])

    def close(self) -> None:
        """End with the layer."""
        if self.span == 1 or len(self.starts) == self.span:
            sum_over_processes(self.sums.sums())
            self.found.append(self.sums.score().cpu())

    def scores(self, layers: int, starts: Sequence[int] | None = None) -> Tensor:
        """For each layer the score of the best run that it is part of, float32 [N].

        ``starts``: of the runs that count; a layer in none of them has the score of the worst run of all.
        """
        runs_R = torch.stack(self.found)
        if starts is not None:
            counts_R = torch.zeros(len(runs_R), dtype=torch.bool).index_fill_(0, torch.tensor(starts), True)
            runs_R = runs_R.where(counts_R, runs_R.max())
        each = [runs_R[max(0, index - self.span + 1) : index + 1].min() for index in range(layers)]
        return torch.stack(each)


def _require_trail(width: WidthCriterion, store: HiddenStateStore) -> None:
    if store.cache is None:
        raise CalibrationError(
            f"width.criterion {width.kind} goes back over the hidden states after every layer, and there is no room "
            "for them; free disk in the run folder, raise calibration.stream_disk, or choose another criterion"
        )


def _score_backwards(
    back: LayerwiseBackward,
    anatomy: Anatomy,
    *,
    width: WidthCriterion | None,
    heads: WidthCriterion | None,
    scores: Scores,
) -> None:
    """Score what every token goes through by its effects on the loss."""
    decoder = back.forward.decoder
    for index in track(range(len(decoder) - 1, -1, -1), "pass 1: gradients"):
        with decoder.layer(index) as layer:
            parts = [
                part
                for part in projections(layer, anatomy, index=index, width=width, heads=heads)
                if isinstance(part, Neurons)
            ]
            for effects in back.effects(index, layer, modules=[part.output for part in parts]):
                for part, effect_BLF in zip(parts, effects, strict=True):
                    part.sums.update(effect_BLF)
            for part in parts:
                part.write(scores)


def _require_finite(scores: Scores) -> None:
    kinds = (scores.neurons, scores.experts, scores.heads)
    bad = [key for kind in kinds for key, values in kind.items() if not _is_finite(values)]
    if scores.layers is not None and not _is_finite(scores.layers):
        bad.append("layers")
    if bad:
        raise NumericalError(f"the scores of {', '.join(bad[:3])} are not finite; try model.dtype: float32")


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
