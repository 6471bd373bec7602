"""Evaluation of a run: the dense model, the cut without refit, and the saved checkpoint."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.common.distributed import is_first_process
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.data.windows import fingerprint_tokens
from llmprune.evaluation.evaluate import Decoders, Measured, measure
from llmprune.evaluation.lm_eval.harness import evaluated_model
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.step_costs import measure_step
from llmprune.publish.push import refuse_fewer_samples
from llmprune.recipe.model import ModelSource
from llmprune.results.run_folder import TASKS, file_fingerprint, fingerprint


def evaluate(context: RunContext, cut: Cut) -> Measured:
    """Return all measurements that the recipe asks for, from the run folder or measured now.

    Raises OutputError where the folder holds answers to more samples than the recipe asks for.
    """
    inputs, folder = context.inputs, context.folder
    evaluation = context.recipe.evaluation.model_copy(update={"gate": None})
    if not (evaluation.perplexity or evaluation.tasks or evaluation.speed):
        return Measured()

    def make(path: Path) -> Measured:
        measured = _measure(context, cut)
        folder.write(path.name, measured.model_dump_json(indent=1) + "\n")
        return measured

    def load(path: Path) -> Measured:
        return Measured.model_validate_json(path.read_text(encoding="utf-8"))

    origin = fingerprint(
        inputs.identity,
        file_fingerprint(folder.path / "pruning.json"),
        evaluation.model_dump_json(),
        fingerprint_tokens(inputs.held_out) if inputs.held_out is not None else None,
    )
    if is_first_process():
        refuse_fewer_samples(folder.path, evaluation.limit)
    return folder.produce("evaluation", origin, file="evaluation.json", load=load, make=make, together=True)


def _measure(context: RunContext, cut: Cut) -> Measured:
    recipe, inputs, folder = context.recipe, context.inputs, context.folder
    source = pruned_source(recipe.model, folder.path / "model")
    pruned = cache(lambda: load_model(source))
    dense_subject = evaluated_model(recipe.model, inputs.tokenizer, load=lambda: inputs.model)
    pruned_subject = evaluated_model(source, inputs.tokenizer, load=pruned, folder=folder.path / TASKS)
    cut_only = None
    if (recipe.refit or recipe.sparsity) and not cut.is_empty and recipe.evaluation.perplexity:
        cut_only = cut_decoder(inputs.dense, anatomy=inputs.anatomy, cut=cut)
    decoders = Decoders(inputs.dense, cut_only, open_decoder(source))
    with measure_step(folder.steps, "evaluation"):
        return measure(
            recipe.evaluation, dense_subject, pruned=pruned_subject, decoders=decoders, held_out_NL=inputs.held_out
        )


def pruned_source(base: ModelSource, folder: Path) -> ModelSource:
    """Return the checkpoint in ``folder`` as a model source with the loading options of its base."""
    return base.model_copy(update={"id": str(folder.absolute()), "revision": ModelSource(id=str(folder)).revision})
