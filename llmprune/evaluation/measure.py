"""Dense and pruned measured with the same settings: perplexity, tasks, generation speed."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.calibration import TokenWindows
from llmprune.evaluation.harness import run_tasks
from llmprune.evaluation.perplexity import perplexity
from llmprune.evaluation.retention import compare
from llmprune.evaluation.section import Evaluation, Perplexity
from llmprune.evaluation.speed import compare_speed
from llmprune.model.walk import Decoder
from llmprune.report.value import Figures, PerplexityFigures, SpeedFigures, TaskFigures


class Measured(Figures):
    """All that was measured on dense and pruned."""

    perplexity: PerplexityFigures | None
    tasks: tuple[TaskFigures, ...]
    speed: SpeedFigures | None


def measure(
    settings: Evaluation,
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    decoders: tuple[Decoder, Decoder | None, Decoder],
    tokenizer: PreTrainedTokenizerBase | None,
    held_out_NL: Tensor | None,
) -> Measured:
    """Measure what the recipe asks for. ``decoders``: dense, the cut without refit or None, pruned."""
    figures = None
    if settings.perplexity is not None and held_out_NL is not None:
        figures = _measure_perplexity(settings.perplexity, decoders, held_out_NL)
    tasks: tuple[TaskFigures, ...] = ()
    if settings.tasks:
        assert tokenizer is not None, "tasks need a tokenizer"
        tasks = compare(run_tasks(dense, tokenizer, settings), run_tasks(pruned, tokenizer, settings))
    speed = compare_speed(dense, pruned, settings.speed) if settings.speed else None
    return Measured(perplexity=figures, tasks=tasks, speed=speed)


def _measure_perplexity(
    settings: Perplexity,
    decoders: tuple[Decoder, Decoder | None, Decoder],
    held_out_NL: Tensor,
) -> PerplexityFigures:
    dense, cut, pruned = (
        perplexity(decoder, held_out_NL, settings.batch_size, name) if decoder else None
        for name, decoder in zip(("dense", "cut", "pruned"), decoders, strict=True)
    )
    assert dense is not None, "dense and pruned are always measured"
    assert pruned is not None
    return PerplexityFigures(
        dense=dense,
        cut=cut,
        pruned=pruned,
        tokens=held_out_NL[:, 1:].numel(),
        source=describe_source(settings),
    )


def describe_source(windows: TokenWindows) -> str:
    """Where token windows come from, in words."""
    if windows.tokens is not None:
        return f"{windows.tokens} ({windows.key})"
    return ", ".join(f"{source.dataset} ({source.split})" for source in windows.text_sources())
