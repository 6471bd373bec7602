"""Pass 1: a layer-wise forward pass of the dense model that scores layers, neurons, attention heads and experts.

Criteria that need gradients score in a layer-wise backward pass after it.

Shapes: B batch, L sequence length, D hidden size, F neurons of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from llmprune.anatomy.types import Anatomy
from llmprune.common.distributed import sum_over_processes
from llmprune.common.errors import CalibrationError, NumericalError
from llmprune.common.progress import track
from llmprune.criteria.base import HiddenStateCriterion, WidthCriterion
from llmprune.criteria.combine import Combine, combine_scores
from llmprune.cut.layer_choice import starts_in_pattern
from llmprune.layerwise.backward import LayerwiseBackward
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states import HiddenStateStore
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.layer_spans import LayerSpans
from llmprune.score.scorers import NeuronScorer, Scorer, scorers_of
from llmprune.score.scores import Scores, combine_sources
from llmprune.score.source_parts import SourceParts


def score(
    decoder: Decoder,
    anatomy: Anatomy,
    *,
    criteria: ScoringCriteria,
    calibration: CalibrationBatches,
    target: DepthTarget = DepthTarget(),  # noqa: B008  # frozen
) -> Scores:
    """Return the scores by the given criteria, the same in every process.

    Layers are scored only by a ``HiddenStateCriterion``; ``layer_ablation_scores`` scores them by ablation. Raises
    CalibrationError where gradients are needed and there is no cache of hidden states, NumericalError where a score is
    not finite. With ``calibration.sources_N`` the sources' scores are combined, and kept in ``Scores.by_source``.
    """
    backward, cache = criteria.by_gradients, calibration.store.cache
    if backward:
        _require_cache(backward, calibration.store)
    forward = calibration.forward(decoder)
    depth, parts = criteria.depth, SourceParts(forward, calibration.sources_N, batch_size=calibration.batch_size)
    spans = LayerSpans(depth, target.remove, parts=parts) if isinstance(depth, HiddenStateCriterion) else None
    criteria = criteria.for_tokens(calibration.tokens_of_smallest_source)
    in_forward = replace(criteria, width=None, heads=None) if backward else criteria
    scores = [Scores(None, {}) for _ in range(parts.count)]
    for index in track(range(len(decoder)), "pass 1: scoring layers"):
        with decoder.layer(index) as layer:
            _score_layer(
                index,
                layer,
                parts=parts,
                spans=spans,
                scorers=scorers_of(index, layer, anatomy=anatomy, criteria=in_forward, parts=parts),
                scores=scores,
            )
            if cache is not None:
                cache.keep(index, forward.hidden_states)
    if backward and cache is not None:
        relative = backward.requires == "relative_activation_times_gradient"
        gradients = LayerwiseBackward(forward, cache, relative=relative)
        own = replace(criteria, experts=None)
        _score_by_gradients(gradients, anatomy, criteria=own, parts=parts, scores=scores)
    for one in scores:
        _require_finite(one)
    combined = combine_sources(scores, calibration.combine)
    if spans is None:
        return combined
    starts = starts_in_pattern(anatomy, spans.length) if target.keep_pattern and spans.length > 1 else None
    return _with_layers(combined, spans, layers=len(decoder), starts=starts, rule=calibration.combine)


def _score_layer(
    index: int,
    layer: nn.Module,
    *,
    parts: SourceParts,
    spans: LayerSpans | None,
    scorers: Sequence[Scorer],
    scores: Sequence[Scores],
) -> None:
    """Run every batch through one layer and write its scores; scorers hold weights and end with the call."""
    forward = parts.forward
    with ExitStack() as hooks:
        for scorer in scorers:
            scorer.watch(hooks)
        span = spans.begin(forward.decoder.device_of(index)) if spans else None
        for batch, hidden_BLD, output_BLD in forward.outputs(index, layer):
            if span:
                span.update(batch, hidden_BLD, output_BLD=output_BLD)
            forward.advance(batch, output_BLD)
        in_span = span.reducible_state() if span else []
        sum_over_processes([*in_span, *_sums_of(scorers)])
        if spans and span:
            spans.end(span)
        for scorer in scorers:
            scorer.write(scores)


def _sums_of(scorers: Sequence[Scorer]) -> list[Tensor]:
    return [tensor for scorer in scorers for tensor in scorer.reducible_state()]


def _require_cache(criterion: WidthCriterion, store: HiddenStateStore) -> None:
    if store.cache is None:
        raise CalibrationError(
            f"width.criterion {criterion.kind} needs the hidden states after every layer for its backward pass, and "
            "there is no space for them; free disk in the run folder, raise calibration.stream_disk, or choose another "
            "criterion"
        )


def _score_by_gradients(
    backward: LayerwiseBackward,
    anatomy: Anatomy,
    *,
    criteria: ScoringCriteria,
    parts: SourceParts,
    scores: Sequence[Scores],
) -> None:
    """Score the units that every token passes through by their effects on the loss, from the last layer on."""
    decoder = backward.forward.decoder
    for index in track(range(len(decoder) - 1, -1, -1), "pass 1: gradients"):
        with decoder.layer(index) as layer:
            found = scorers_of(index, layer, anatomy=anatomy, criteria=criteria, parts=parts)
            scorers = [scorer for scorer in found if isinstance(scorer, NeuronScorer)]
            for batch, effects in enumerate(backward.effects(index, layer, modules=[one.output for one in scorers])):
                for scorer, effect_BLF in zip(scorers, effects, strict=True):
                    for source, part_RLF in parts.windows(batch, effect_BLF):
                        scorer.accumulators[source].update(part_RLF)
            sum_over_processes(_sums_of(scorers))
            for scorer in scorers:
                scorer.write(scores)


def _with_layers(
    scores: Scores, spans: LayerSpans, *, layers: int, starts: Sequence[int] | None, rule: Combine
) -> Scores:
    """Return the scores with those of layers, of which spans are combined. Raises NumericalError as ``score`` does."""
    by_source = spans.by_source()
    for spans_S in by_source:
        _require_finite(Scores(spans_S, {}))
    layers_of = partial(spans.of_layers, layers=layers, starts=starts)
    own = tuple(
        replace(one, layers=layers_of(spans_S)) for one, spans_S in zip(scores.by_source, by_source, strict=False)
    )
    return replace(scores, layers=layers_of(combine_scores(by_source, rule)), by_source=own)


def _require_finite(scores: Scores) -> None:
    kinds = (scores.neurons, scores.experts, scores.heads)
    bad = [key for kind in kinds for key, values in kind.items() if not _is_finite(values)]
    if scores.layers is not None and not _is_finite(scores.layers):
        bad.append("layers")
    if bad:
        raise NumericalError(f"the scores of {', '.join(bad[:3])} are not finite; try model.dtype: float32")


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
