"""Pass 1: a layer-wise forward pass of the dense model that scores layers, neurons, attention heads and experts.

Criteria that need gradients score in a layer-wise backward pass after it (``gradients``).

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from llmprune.anatomy.layer_kinds import starts_of_spans
from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.common.distributed import sum_over_processes
from llmprune.common.errors import NumericalError
from llmprune.common.progress import track
from llmprune.criteria.base import HiddenStateCriterion
from llmprune.criteria.combine import Combine, combine_scores
from llmprune.cut.layer_choice import required_kinds
from llmprune.layerwise.decoder import Decoder
from llmprune.score.channels import ChannelScorer
from llmprune.score.gradients import blend, require_cache, score_by_gradients
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.layer_spans import LayerSpans
from llmprune.score.scorer import Scorer
from llmprune.score.scorers import scorers_of, sums_of
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
    CalibrationError where a criterion does not score without gradients and there is no cache of hidden states for them,
    NumericalError where a score is not finite. With ``calibration.sources_N`` the sources' scores are combined, and
    kept in ``Scores.by_source``; where they are pooled, their sums are combined.
    """
    require_cache(criteria, calibration)
    criteria = criteria.for_tokens(calibration.tokens_of_smallest_source)
    forward, depth = calibration.forward(decoder), criteria.depth
    parts = calibration.parts(forward)
    spans = LayerSpans(depth, target.remove, parts=parts) if isinstance(depth, HiddenStateCriterion) else None
    scores = [Scores(None, {}) for _ in range(parts.scored)]
    for index in track(range(len(decoder)), "pass 1: scoring layers"):
        with decoder.layer(index) as layer:
            _score_layer(
                index,
                layer,
                parts=parts,
                spans=spans,
                scorers=_scorers(index, layer, anatomy=anatomy, criteria=criteria.in_forward, parts=parts),
                scores=scores,
            )
            if calibration.store.cache is not None:
                calibration.store.cache.keep(index, forward.hidden_states)
    with_gradients = score_by_gradients(forward, anatomy, criteria=criteria.in_backward, calibration=calibration)
    scores = [blend(one, own, criteria=criteria) for one, own in zip(scores, with_gradients, strict=True)]
    for one in scores:
        _require_finite(one)
    combined = combine_sources(scores, calibration.combine)
    if spans is None:
        return combined
    kinds = required_kinds(anatomy, keep_pattern=target.keep_pattern)
    starts = starts_of_spans(kinds, spans.length) if kinds and spans.length > 1 else None
    return _with_layers(combined, spans, layers=len(decoder), starts=starts, rule=calibration.combine)


def _scorers(
    index: int, layer: nn.Module, *, anatomy: Anatomy, criteria: ScoringCriteria, parts: SourceParts
) -> list[Scorer]:
    """Return the scorers of a layer's parts, and of the residual channels where these are scored."""
    scorers = scorers_of(index, layer, anatomy=anatomy, criteria=criteria, parts=parts)
    if criteria.hidden and anatomy.hidden:
        hidden, key = anatomy.hidden, unit_key(index, "")
        scorers.append(ChannelScorer(key, layer, dims=hidden.layers[index], size=hidden.size, parts=parts))
    return scorers


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
        sum_over_processes([*in_span, *sums_of(scorers)])
        if spans and span:
            spans.end(span)
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
    kinds = (scores.neurons, scores.experts, scores.heads, scores.hidden)
    bad = [key for kind in kinds for key, values in kind.items() if not _is_finite(values)]
    if scores.layers is not None and not _is_finite(scores.layers):
        bad.append("layers")
    if bad:
        raise NumericalError(f"the scores of {', '.join(bad[:3])} are not finite; try model.dtype: float32")


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
