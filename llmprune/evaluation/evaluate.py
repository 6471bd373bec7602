"""Evaluation of dense and pruned model with the same settings: perplexity, tasks, free generation, speed.

Held-out text is measured layer by layer. Whole models are loaded for the rest, one after the other; both are in memory
together only for alternate timing, where they fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmprune.checkpoint.model_memory import fit_together
from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.progress import report_progress
from llmprune.data.windows import TextWindows
from llmprune.evaluation.answers import GreedyAnswers
from llmprune.evaluation.bench.generation_speed import compare_speed
from llmprune.evaluation.lm_eval.harness import EvaluatedModel, evaluate_tasks
from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.evaluation.perplexity import compare_predictions, perplexity
from llmprune.evaluation.prompts import Prompts
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.evaluation import Evaluation, Perplexity
from llmprune.results.figures.base import Figures
from llmprune.results.figures.evaluation import (
    AnswerAgreement,
    DivergenceFigures,
    GenerationFigures,
    PerplexityFigures,
    SpeedFigures,
)


class Measured(Figures):
    """Measurements of dense and pruned model, without intervals and verdicts."""

    perplexity: PerplexityFigures | None = None
    divergence: DivergenceFigures | None = None
    dense_tasks: TaskResults = TaskResults(tasks=())
    pruned_tasks: TaskResults = TaskResults(tasks=())
    repaired_tasks: TaskResults | None = None  # of the model before the training
    generation: GenerationFigures | None = None
    agreement: tuple[AnswerAgreement, ...] = ()  # along each of the dense model's greedy answers
    speed: SpeedFigures | None = None
    bits_per_byte: tuple[float, float] | None = None  # dense and pruned, where their tokens differ
    warnings: tuple[str, ...] = ()  # batches that were halved for want of memory, and answers that were left out


@dataclass(frozen=True)
class Decoders:
    """Decoders for the layer-wise measurements on held-out text."""

    dense: Decoder
    cut: Decoder | None  # after the cut, before any refit; None if nothing is refit
    repaired: Decoder | None  # before the training; None if it is not measured
    pruned: Decoder

    @property
    def of_files(self) -> tuple[Decoder, ...]:
        """Decoders other than the dense one."""
        return tuple(one for one in (self.cut, self.repaired, self.pruned) if one is not None)


def measure_predictions(
    settings: Perplexity, decoders: Decoders, *, held_out: TextWindows, batch_size: int, store: HiddenStateStore
) -> tuple[PerplexityFigures, DivergenceFigures]:
    """Measure perplexity and divergence on held-out text. Processes share its batches and return the same values."""
    windows_NL, begin = held_out.windows_NL, held_out.begin
    alone = {
        name: perplexity(decoder, windows_NL, batch_size=batch_size, name=name, store=store, begin=begin)
        for name, decoder in (("cut", decoders.cut), ("repaired", decoders.repaired))
        if decoder is not None
    }
    compared = compare_predictions(
        decoders.dense, decoders.pruned, windows_NL=windows_NL, batch_size=batch_size, store=store, begin=begin
    )
    figures = PerplexityFigures(
        dense=compared.dense_perplexity,
        cut=alone.get("cut"),
        repaired=alone.get("repaired"),
        pruned=compared.pruned_perplexity,
        tokens=compared.divergence.tokens,
        source=describe_source(settings),
    )
    return figures, compared.divergence


def measure_models(
    settings: Evaluation,
    dense: EvaluatedModel,
    *,
    pruned: EvaluatedModel,
    repaired: EvaluatedModel | None = None,
    prompts: Prompts | None,
    answering: Mapping[str, EvaluatedModel] | None = None,
) -> Measured:
    """Measure tasks, generation and speed, as the recipe's evaluation section asks; ``prompts``: None: no generation.

    ``repaired``: the model before the training, of which only the tasks are measured. ``answering``: models that answer
    in place of the dense or the pruned one, because that has other tokens.
    A model is loaded only where something is left to measure on it. With several processes all share the tasks, the
    first measures the rest, and all return the same value.
    """
    together = settings.speed is not None and is_first_process() and fit_together([dense.source, pruned.source])
    tasks: dict[str, TaskResults] = {}
    answers, instead = GreedyAnswers(settings, prompts), answering or {}
    if repaired is not None and settings.task_names:
        report_progress("tasks: repaired")
        tasks["repaired"] = evaluate_tasks(repaired, "repaired", evaluation=settings)
        repaired.whole.release()
    for side, model in (("dense", dense), ("pruned", pruned)):
        if settings.task_names:
            report_progress(f"tasks: {side}")
            tasks[side] = evaluate_tasks(model, side, evaluation=settings)
        if is_first_process():
            other = instead.get(side, model)
            answers.add(side, other)
            if other is not model:
                other.whole.release()
        timed_next = together or (side == "pruned" and settings.speed is not None)
        if settings.backend or not timed_next:  # a backend needs the device
            model.whole.release()
    measured = None
    if is_first_process():
        generation, speed = answers.figures(instead.get("dense", dense).tokenizer), None
        if settings.speed:
            report_progress("speed")
            speed = compare_speed(dense.whole, pruned.whole, settings=settings.speed, together=together)
        reduced = [one for model in (dense, repaired, pruned) if model for one in model.whole.reductions]
        warnings = (*reduced, *answers.left_out)
        measured = Measured(generation=generation, agreement=answers.agreement, speed=speed, warnings=warnings)
    for model in (dense, pruned):
        model.whole.release()
    measured = broadcast_from_first(measured)
    assert measured is not None, "the first process measures or raises"
    return measured.model_copy(update={f"{side}_tasks": results for side, results in tasks.items()})


def describe_source(windows: TokenWindows) -> str:
    """Return the texts or the file of token windows, as ``PLACE (SPLIT), PLACE (SPLIT)``."""
    if windows.tokens is not None:
        return f"{windows.tokens} ({windows.key})"
    return ", ".join(f"{source.dataset} ({source.split})" for source in windows.text_sources())
