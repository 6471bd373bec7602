"""Evaluation of a run: the dense model, the cut without refit, the model before the training, the saved checkpoint."""

from __future__ import annotations

from llmprune.checkpoint.loading import load_tokenizer
from llmprune.checkpoint.model_memory import fits_in_memory
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.checkpoint.result.pruned_source import pruned_source
from llmprune.common.distributed import is_first_process
from llmprune.common.out_of_memory import free_cached_memory
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.data.begin_of_text import describe_begin
from llmprune.evaluation.evaluate import Decoders, Measured, measure_models, measure_predictions
from llmprune.evaluation.lm_eval.harness import EvaluatedModel, evaluated_model
from llmprune.evaluation.prompts import Prompts
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.step_costs import measure_step
from llmprune.pipeline.vocabulary import full_vocabulary_source
from llmprune.pipeline.vocabulary_bits import measure_bits_per_byte
from llmprune.publish.push import refuse_fewer_samples
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.base import Figures
from llmprune.results.figures.evaluation import DivergenceFigures, PerplexityFigures
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import (
    DENSE_KEPT_TOKENS,
    FULL_VOCABULARY,
    RECOVERY,
    REPAIRED,
    TASKS,
    VOCABULARY,
)


def evaluate(context: RunContext, cut: Cut) -> Measured:
    """Return all measurements that the recipe asks for, from the run folder or measured now.

    Raises OutputError where the folder holds answers to more samples than the recipe asks for.
    """
    inputs, folder = context.inputs, context.folder
    evaluation = context.recipe.evaluation.model_copy(update={"gate": None})
    if not (evaluation.perplexity or evaluation.generation or evaluation.task_names or evaluation.speed):
        return Measured()

    origin = fingerprint(
        inputs.identity,
        inputs.reference_model.identity,
        file_fingerprint(folder.path / "pruning.json", folder.path / RECOVERY),
        *([file_fingerprint(folder.path / VOCABULARY)] if context.recipe.vocabulary else []),
        evaluation.model_dump_json(),
        context.recipe.evaluation.requires_generation,
        inputs.held_out_text.fingerprint() if inputs.held_out_text else None,
        inputs.prompts,
    )
    if is_first_process():
        refuse_fewer_samples(folder.path, evaluation)
    return folder.produce_figures(
        "evaluation", origin, file="evaluation.json", kind=Measured, make=lambda: _measure(context, cut)
    )


def _measure(context: RunContext, cut: Cut) -> Measured:
    recipe, inputs, folder = context.recipe, context.inputs, context.folder
    source = pruned_source(recipe.model, folder.path / "model", layers=cut.layers)
    before = None
    if recipe.recover and recipe.evaluation.before_recovery:
        before = pruned_source(recipe.model, folder.path / REPAIRED, layers=cut.layers)
    dense, answering = _dense(context)
    has_own_tokens, changes_layers = recipe.vocabulary is not None, not recipe.cuts_only_vocabulary
    tokenizer = load_tokenizer(source) if has_own_tokens else inputs.tokenizer
    pruned = evaluated_model(source, tokenizer, folder=folder.path / TASKS)
    full = full_vocabulary_source(context, cut) if has_own_tokens else source
    if has_own_tokens:
        answering["pruned"] = evaluated_model(full, inputs.tokenizer, folder=folder.path / TASKS / FULL_VOCABULARY)
    repaired = evaluated_model(before, inputs.tokenizer, folder=folder.path / TASKS / REPAIRED) if before else None
    inputs.release()
    with measure_step(folder.steps, "evaluation"):
        found = _measure_predictions(context, cut, source=full, before=before) if changes_layers else {}
        bits = measure_bits_per_byte(context, source, tokenizer=tokenizer) if has_own_tokens else None
        free_cached_memory()
        prompts, left_out = _prompts(context) if changes_layers else (None, [])
        measured = measure_models(
            recipe.evaluation,
            dense,
            pruned=pruned,
            repaired=repaired,
            prompts=prompts,
            answering=answering,
        )
    own = {"bits_per_byte": bits, "warnings": (*measured.warnings, *left_out)}
    return measured.model_copy(update=found | own)


def _dense(context: RunContext) -> tuple[EvaluatedModel, dict[str, EvaluatedModel]]:
    """Return the reference to evaluate, and the one with the pruned model's tokens by side, where these differ."""
    inputs, reference = context.inputs, context.inputs.reference_model
    if reference.tokens is None:
        return evaluated_model(reference.source, inputs.tokenizer), {}
    folder = context.folder.path / TASKS / DENSE_KEPT_TOKENS
    same_tokens = evaluated_model(reference.source, inputs.tokenizer, folder=folder, load=reference.load)
    return evaluated_model(reference.source, load_tokenizer(reference.source)), {"dense": same_tokens}


def _prompts(context: RunContext) -> tuple[Prompts | None, list[str]]:
    """Return the prompts of the generation check, and why it is left out where it is the default and not possible.

    A model that fits neither on its devices nor in RAM would be read from the disk for every token of an answer; a
    server of models may have left no memory for another.
    """
    prompts, evaluation = context.inputs.prompts, context.recipe.evaluation
    if isinstance(prompts, str):
        return None, [prompts]
    if prompts is None or evaluation.requires_generation:
        return prompts, []
    reason = None
    if evaluation.backend and evaluation.backend.serves_elsewhere:
        reason = "the models of evaluation.backend may hold the devices' memory"
    elif not fits_in_memory(context.recipe.model):
        reason = "the model does not fit in memory, so that every token of an answer would read it from the disk"
    if reason is None:
        return prompts, []
    remedy = "set evaluation.generation to {} to compare them nevertheless"
    return None, [f"the answers of both models were not compared: {reason}; {remedy}"]


def _measure_predictions(
    context: RunContext, cut: Cut, *, source: ModelSource, before: ModelSource | None
) -> dict[str, Figures]:
    """Return perplexity and divergence on held-out text, by the names of their fields; none where not asked for.

    ``before``: the model from before the training, if it is measured.
    """
    recipe, inputs = context.recipe, context.inputs
    settings, held_out = recipe.evaluation.perplexity, inputs.held_out_text
    if settings is None or held_out is None:
        return {}
    cut_only = None
    if (recipe.refit or recipe.sparsity) and not cut.is_empty:
        cut_only = cut_decoder(inputs.dense, anatomy=inputs.anatomy, cut=cut)
    repaired = open_decoder(before, working=inputs.whole_devices) if before else None
    decoders = Decoders(inputs.reference, cut_only, repaired, open_decoder(source, working=inputs.whole_devices))
    memory, folder = recipe.calibration.stream_memory, context.folder.path

    def measure(batch_size: int) -> tuple[PerplexityFigures, DivergenceFigures]:
        store = HiddenStateStore(memory, folder, device_bytes=inputs.hidden_state_bytes)
        return measure_predictions(settings, decoders, held_out=held_out, batch_size=batch_size, store=store)

    def evict() -> None:
        inputs.evict()
        for decoder in decoders.of_files:
            decoder.save_memory()

    perplexity, divergence = context.batches.held_out.run("held-out text", measure, release=evict)
    inputs.release()
    perplexity = perplexity.model_copy(update={"begin_of_text": describe_begin(held_out.begin, inputs.tokenizer)})
    return {"perplexity": perplexity, "divergence": divergence}
