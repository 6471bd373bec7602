"""Dense and pruned measured with the same settings: perplexity, tasks, free generation, speed."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.common.distributed import from_first, is_first
from llmprune.evaluation.bench.generation_speed import compare_speed
from llmprune.evaluation.generation import compare_generation
from llmprune.evaluation.lm_eval.harness import Subject, ask
from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.evaluation.perplexity import compare_predictions, perplexity
from llmprune.layerwise.decoder import Decoder
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.evaluation import Evaluation, Perplexity
from llmprune.results.schema import DivergenceFigures, Figures, GenerationFigures, PerplexityFigures, SpeedFigures


class Measured(Figures):
    """All that was measured on dense and pruned. What it means (intervals, verdicts) is worked out for the report."""

    perplexity: PerplexityFigures | None = None
    divergence: DivergenceFigures | None = None
    dense_tasks: TaskResults = TaskResults(tasks=())
    pruned_tasks: TaskResults = TaskResults(tasks=())
    generation: GenerationFigures | None = None
    speed: SpeedFigures | None = None


def measure(
    settings: Evaluation,
    dense: Subject,
    *,
    pruned: Subject,
    decoders: tuple[Decoder, Decoder | None, Decoder],
    held_out_NL: Tensor | None,
) -> Measured:
    """Measure what the recipe asks for. ``decoders``: dense, the cut without refit or None, pruned.

    Under a launcher every process takes its share of the tasks; the rest is the first one's. All get the value.
    """
    tasks = (
        [ask(dense, "dense", evaluation=settings), ask(pruned, "pruned", evaluation=settings)] if settings.tasks else []
    )
    dense_model, pruned_model = dense.load(), pruned.load()
    found = None
    if is_first():
        found = _measure_alone(
            settings,
            dense_model,
            pruned=pruned_model,
            tokenizer=dense.tokenizer,
            decoders=decoders,
            held_out_NL=held_out_NL,
        )
    found = from_first(found)
    assert found is not None, "the first process measures or raises"
    return found.model_copy(update={"dense_tasks": tasks[0], "pruned_tasks": tasks[1]}) if tasks else found


def _measure_alone(
    settings: Evaluation,
    dense: PreTrainedModel,
    *,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    decoders: tuple[Decoder, Decoder | None, Decoder],
    held_out_NL: Tensor | None,
) -> Measured:
    figures, divergence, generation = None, None, None
    if settings.perplexity is not None and held_out_NL is not None:
        figures, divergence = _measure_held_out(settings.perplexity, decoders, held_out_NL=held_out_NL)
        if settings.generation:
            generation = compare_generation(
                dense, pruned, tokenizer=tokenizer, windows_NL=held_out_NL, settings=settings.generation
            )
    speed = compare_speed(dense, pruned, settings=settings.speed) if settings.speed else None
    return Measured(perplexity=figures, divergence=divergence, generation=generation, speed=speed)


def _measure_held_out(
    settings: Perplexity,
    decoders: tuple[Decoder, Decoder | None, Decoder],
    *,
    held_out_NL: Tensor,
) -> tuple[PerplexityFigures, DivergenceFigures]:
    whole, cut, pruned = decoders
    only_cut = perplexity(cut, held_out_NL, batch_size=settings.batch_size, what="cut") if cut else None
    before, after, divergence = compare_predictions(
        whole, pruned, windows_NL=held_out_NL, batch_size=settings.batch_size
    )
    figures = PerplexityFigures(
        dense=before,
        cut=only_cut,
        pruned=after,
        tokens=held_out_NL[:, 1:].numel(),
        source=describe_source(settings),
    )
    return figures, divergence


def describe_source(windows: TokenWindows) -> str:
    """Where token windows come from, in words."""
    if windows.tokens is not None:
        return f"{windows.tokens} ({windows.key})"
    return ", ".join(f"{source.dataset} ({source.split})" for source in windows.text_sources())
