"""Evaluation of dense and pruned model with the same settings: perplexity, tasks, free generation, speed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.progress import report_progress
from llmprune.evaluation.bench.generation_speed import compare_speed
from llmprune.evaluation.generation import compare_generation
from llmprune.evaluation.lm_eval.harness import EvaluatedModel, evaluate_tasks
from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.evaluation.perplexity import compare_predictions, perplexity
from llmprune.layerwise.decoder import Decoder
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.evaluation import Evaluation, Perplexity
from llmprune.results.evaluation_figures import DivergenceFigures, GenerationFigures, PerplexityFigures, SpeedFigures
from llmprune.results.figures import Figures


class Measured(Figures):
    """Measurements of dense and pruned model, without intervals and verdicts."""

    perplexity: PerplexityFigures | None = None
    divergence: DivergenceFigures | None = None
    dense_tasks: TaskResults = TaskResults(tasks=())
    pruned_tasks: TaskResults = TaskResults(tasks=())
    generation: GenerationFigures | None = None
    speed: SpeedFigures | None = None


@dataclass(frozen=True)
class Decoders:
    """Decoders for the layer-wise measurements on held-out text."""

    dense: Decoder
    cut: Decoder | None  # after the cut, before any refit; None if nothing is refit
    pruned: Decoder


def measure(
    settings: Evaluation,
    dense: EvaluatedModel,
    *,
    pruned: EvaluatedModel,
    decoders: Decoders,
    held_out_NL: Tensor | None,
) -> Measured:
    """Measure everything that the recipe's evaluation section names.

    With several processes all share the tasks, the first measures the rest, and all return the same value.
    """
    tasks = (
        [
            evaluate_tasks(dense, "dense", evaluation=settings),
            evaluate_tasks(pruned, "pruned", evaluation=settings),
        ]
        if settings.tasks
        else []
    )
    models = dense.load(), pruned.load()
    measured = None
    if is_first_process():
        measured = _measure_in_first(
            settings, models, tokenizer=dense.tokenizer, decoders=decoders, held_out_NL=held_out_NL
        )
    measured = broadcast_from_first(measured)
    assert measured is not None, "the first process measures or raises"
    return measured.model_copy(update={"dense_tasks": tasks[0], "pruned_tasks": tasks[1]}) if tasks else measured


def describe_source(windows: TokenWindows) -> str:
    """Return the texts or the file of token windows, as ``PLACE (SPLIT), PLACE (SPLIT)``."""
    if windows.tokens is not None:
        return f"{windows.tokens} ({windows.key})"
    return ", ".join(f"{source.dataset} ({source.split})" for source in windows.text_sources())


def _measure_in_first(
    settings: Evaluation,
    models: tuple[PreTrainedModel, PreTrainedModel],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    decoders: Decoders,
    held_out_NL: Tensor | None,
) -> Measured:
    dense, pruned = models
    figures, divergence, generation = None, None, None
    if settings.perplexity is not None and held_out_NL is not None:
        figures, divergence = _measure_predictions(settings.perplexity, decoders, held_out_NL=held_out_NL)
        if settings.generation:
            report_progress("free generation")
            generation = compare_generation(
                dense, pruned, tokenizer=tokenizer, windows_NL=held_out_NL, settings=settings.generation
            )
    speed = None
    if settings.speed:
        report_progress("speed")
        speed = compare_speed(dense, pruned, settings=settings.speed)
    return Measured(perplexity=figures, divergence=divergence, generation=generation, speed=speed)


def _measure_predictions(
    settings: Perplexity, decoders: Decoders, *, held_out_NL: Tensor
) -> tuple[PerplexityFigures, DivergenceFigures]:
    batch_size, cut = settings.batch_size, None
    if decoders.cut is not None:
        cut = perplexity(decoders.cut, held_out_NL, batch_size=batch_size, name="cut")
    compared = compare_predictions(decoders.dense, decoders.pruned, windows_NL=held_out_NL, batch_size=batch_size)
    figures = PerplexityFigures(
        dense=compared.dense_perplexity,
        cut=cut,
        pruned=compared.pruned_perplexity,
        tokens=held_out_NL[:, 1:].numel(),
        source=describe_source(settings),
    )
    return figures, compared.divergence
