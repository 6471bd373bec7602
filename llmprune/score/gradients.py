"""Scores of neurons and key-value groups by gradients of the loss, in a layer-wise backward pass.

A criterion that also scores in the forward pass does without gradients where there are none: where the disk has no
space for the hidden states that they are computed from, a layer cannot be differentiated, or the backward pass of a
single window does not fit into a device's memory. Its scores are then those of the forward pass.

Shapes: N windows, B batch, L sequence length, F neurons of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmprune.anatomy.types import Anatomy
from llmprune.common.distributed import sum_over_processes, world_size
from llmprune.common.errors import CalibrationError, DeviceMemoryError
from llmprune.common.progress import track
from llmprune.criteria.ablation import evenly_spaced
from llmprune.criteria.base import WidthCriterion
from llmprune.layerwise.backward import Effects, LayerwiseBackward, NotDifferentiableError
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.scorers import NeuronScorer, scorers_of, sums_of
from llmprune.score.scores import Scores
from llmprune.score.source_parts import SourceParts


def windows_for_gradients(criteria: ScoringCriteria, windows: int, *, generated_N: Tensor | None) -> Tensor:
    """Return the numbers of the windows that have a backward pass, int64 [N], ascending; none where none need one.

    Where gradients are not required they are some of those that the dense model wrote itself, evenly spaced and at
    least one a process. Where there are fewer than processes, each process takes all of them: the scores are means,
    which are the same then. ``generated_N``: True for all of those, bool [N]; None where it wrote none.
    """
    own_N = torch.arange(0) if generated_N is None else generated_N.nonzero().squeeze(1)
    number = criteria.windows_for_gradients(windows, len(own_N))
    if criteria.requires_gradients:
        return torch.arange(number)
    if not number or len(own_N) < world_size():
        return own_N.repeat_interleave(world_size()) if number else own_N[:0]
    return own_N[evenly_spaced(min(max(number, world_size()), len(own_N)), len(own_N))]


def require_cache(criteria: ScoringCriteria, calibration: CalibrationBatches) -> None:
    """Raise CalibrationError where gradients are required and the disk has no space for the hidden states."""
    criterion = criteria.requires_gradients
    if criterion and calibration.store.cache is None:
        raise CalibrationError(
            f"width.criterion {criterion.kind} needs the hidden states after every layer for its backward pass, and "
            "there is no space for them; free disk in the run folder, raise calibration.stream_disk, or choose another "
            "criterion"
        )


def score_by_gradients(
    forward: LayerwiseForward, anatomy: Anatomy, *, criteria: ScoringCriteria, calibration: CalibrationBatches
) -> list[Scores]:
    """Return the scores by each source of the units that every token passes through; some are missing where a layer
    cannot be differentiated and ``criteria`` do without, all where the memory or the disk is too small.

    ``forward`` has passed the last layer, with all windows of the calibration; where windows of their own have the
    backward pass, it is released. They score all sources. Raises NotDifferentiableError where a layer cannot be
    differentiated and a criterion needs it.
    """
    sources = calibration.parts(forward).scored
    if not criteria:
        return _no_scores(sources)
    if calibration.gradients is None:
        return _score_batches(calibration, forward=forward, anatomy=anatomy, criteria=criteria)
    forward.release()
    score_own = partial(_score_windows, decoder=forward.decoder, anatomy=anatomy, criteria=criteria)
    try:
        return calibration.gradients(score_own) * sources
    except DeviceMemoryError as error:
        return _with_note(_no_scores(sources), str(error))


def _score_windows(
    calibration: CalibrationBatches, *, decoder: Decoder, anatomy: Anatomy, criteria: ScoringCriteria
) -> list[Scores]:
    """Return the scores of windows that no forward pass has stored the hidden states of."""
    forward = calibration.forward(decoder)
    if calibration.store.cache is not None:
        _store(forward, calibration.store.cache)
    return _score_batches(calibration, forward=forward, anatomy=anatomy, criteria=criteria)


def _score_batches(
    calibration: CalibrationBatches, *, forward: LayerwiseForward, anatomy: Anatomy, criteria: ScoringCriteria
) -> list[Scores]:
    """Return the scores by each source from a backward pass along the hidden states that ``forward`` stored."""
    parts = calibration.parts(forward)
    scores = _no_scores(parts.scored)
    if calibration.store.cache is None:
        return _with_note(scores, "the disk has no space for the hidden states that gradients are computed from")
    backward = LayerwiseBackward(forward, calibration.store.cache)
    try:
        for index in track(range(len(forward.decoder) - 1, -1, -1), "pass 1: gradients"):
            _score_layer(backward, index, anatomy=anatomy, criteria=criteria, parts=parts, scores=scores)
    except NotDifferentiableError as error:
        if criteria.requires_gradients:
            raise
        return _with_note(scores, f"layers 0 to {index}: {error}")
    return scores


def blend(forward: Scores, backward: Scores, *, criteria: ScoringCriteria) -> Scores:
    """Return the scores of both passes; those of a unit in both are blended by its criterion."""
    neurons = _blended(forward.neurons, backward.neurons, criterion=criteria.width)
    heads = _blended(forward.heads, backward.heads, criterion=criteria.heads)
    return replace(forward, neurons=neurons, heads=heads, notes=forward.notes + backward.notes)


def _blended(
    forward: dict[str, Tensor], backward: dict[str, Tensor], *, criterion: WidthCriterion | None
) -> dict[str, Tensor]:
    assert criterion is not None or not backward, "only what a criterion scores has scores"
    both = {
        key: criterion.blended(forward[key], score_F) if criterion and key in forward else score_F
        for key, score_F in backward.items()
    }
    return forward | both


def _no_scores(sources: int) -> list[Scores]:
    return [Scores(None, {}) for _ in range(sources)]


def _with_note(scores: Sequence[Scores], why: str) -> list[Scores]:
    """Return the scores with a note; the same for each source."""
    return [replace(one, notes=(f"scored without gradients: {why}",)) for one in scores]


def _store(forward: LayerwiseForward, cache: HiddenStateCache) -> None:
    """Pass the windows through all layers, and save the hidden states after each."""
    for index in track(range(len(forward.decoder)), "pass 1: hidden states for gradients"):
        with forward.decoder.layer(index) as layer:
            forward.pass_through(index, layer)
        cache.keep(index, forward.hidden_states)


def _score_layer(
    backward: LayerwiseBackward,
    index: int,
    *,
    anatomy: Anatomy,
    criteria: ScoringCriteria,
    parts: SourceParts,
    scores: Sequence[Scores],
) -> None:
    """Score the units of one layer by their effects on the loss; those after it are done."""
    with backward.forward.decoder.layer(index) as layer:
        found = scorers_of(index, layer, anatomy=anatomy, criteria=criteria, parts=parts)
        scorers = [scorer for scorer in found if isinstance(scorer, NeuronScorer)]
        modules = [scorer.output for scorer in scorers]
        for batch, effects in enumerate(backward.effects(index, layer, modules=modules)):
            for number, scorer in enumerate(scorers):
                _update(scorer, effects, number=number, parts=parts, batch=batch)
        sum_over_processes(sums_of(scorers))
        for scorer in scorers:
            scorer.write(scores)


def _update(scorer: NeuronScorer, effects: Effects, *, number: int, parts: SourceParts, batch: int) -> None:
    effect_BLF = effects.values[number]
    if scorer.is_relative:
        effect_BLF = effect_BLF / effects.norm_BL1
    for source, part_RLF in parts.windows(batch, effect_BLF):
        scorer.accumulators[source].update(part_RLF)
