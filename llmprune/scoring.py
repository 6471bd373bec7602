"""Pass 1: walk the dense model once; every layer and every neuron gets its scores on the way.

Shapes: N layers, B batch, L sequence length, D hidden size, F neurons of a unit.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmprune.anatomy.value import Anatomy
from llmprune.criteria.base import DepthCriterion, UnitAccumulator, WidthCriterion
from llmprune.errors import NumericalError
from llmprune.model.processes import share_of, sum_over_processes
from llmprune.model.streams import StreamStore
from llmprune.model.walk import Decoder, Walk, inputs_of
from llmprune.progress import track
from llmprune.scores import Scores, unit_key


def score(
    decoder: Decoder,
    anatomy: Anatomy,
    windows_NL: Tensor,
    batch_size: int,
    depth: DepthCriterion | None,
    width: WidthCriterion | None,
    store: StreamStore = StreamStore(),  # noqa: B008  # frozen
) -> Scores:
    """Scores by whichever criteria are given, in one walk; over several processes, the same in each."""
    walk = Walk(decoder, share_of(windows_NL), batch_size, store)
    layer_scores: list[Tensor] = []
    neurons: dict[str, Tensor] = {}
    for index in track(range(len(decoder)), "pass 1: scoring layers"):
        with decoder.layer(index) as layer, ExitStack() as hooks:
            units = _open_units(layer, anatomy, index, width, hooks)
            accumulator = depth.open(decoder.device_of(index)) if depth else None
            for batch, hidden_BLD, output_BLD in walk.outputs(index, layer):
                if accumulator:
                    accumulator.update(hidden_BLD, output_BLD)
                walk.advance(batch, output_BLD)
            for opened in [*units.values(), *([accumulator] if accumulator else [])]:
                sum_over_processes(opened.sums())
            if accumulator:
                layer_scores.append(accumulator.score().cpu())
            neurons |= {key: unit.scores().float().cpu() for key, unit in units.items()}
    scores = Scores(torch.stack(layer_scores) if layer_scores else None, neurons)
    _require_finite(scores)
    return scores


def _open_units(
    layer: nn.Module, anatomy: Anatomy, index: int, width: WidthCriterion | None, hooks: ExitStack
) -> dict[str, UnitAccumulator]:
    opened: dict[str, UnitAccumulator] = {}
    for unit in anatomy.units[index] if width else ():
        assert width is not None
        output = layer.get_submodule(unit.output)
        weight = output.get_parameter("weight")
        accumulator = width.open(weight if unit.output_dim == 1 else weight.T)
        opened[unit_key(index, unit.path)] = accumulator
        hooks.enter_context(inputs_of(output, accumulator.update))
    return opened


def _require_finite(scores: Scores) -> None:
    bad = [key for key, values in scores.neurons.items() if not values.isfinite().all()]
    if scores.layers is not None and not scores.layers.isfinite().all():
        bad.append("layers")
    if bad:
        raise NumericalError(f"the scores of {', '.join(bad[:3])} are not finite; try model.dtype: float32")
