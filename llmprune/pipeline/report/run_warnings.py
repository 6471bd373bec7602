"""Warnings of a run's report: those of its plan, and those that only the run could find."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.checkpoint.prediction_heads import describe_heads
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.prune_checkpoint import PrunedCheckpoint
from llmprune.pipeline.report.expert_warnings import warn_of_experts_without_refit, warn_of_unrouted_experts
from llmprune.pipeline.report.round_figures import about_rounds
from llmprune.pipeline.report.run_results import RunResults
from llmprune.pipeline.step_costs import warn_of_slow_disk
from llmprune.planning.next_tools.tool_compatibility import settle_patterns
from llmprune.prune.records import LayerRecord
from llmprune.recipe.sparsity import Sparsity
from llmprune.results.figures.prediction_heads import PredictionHeads
from llmprune.results.formatting import ranges
from llmprune.results.sentences.prediction_heads import describe_prediction_heads


def warnings_of(context: RunContext, results: RunResults) -> tuple[str, ...]:
    """Return the warnings of a finished run, each a sentence."""
    chosen, planned = results.chosen, context.whole_plan.prediction_heads
    notes = context.whole_plan.notes
    if planned is not None and planned != results.pruned.heads:  # the sentence of the run follows
        notes = tuple(note for note in notes if note != describe_prediction_heads(planned))
    unrouted = warn_of_unrouted_experts(results.scores) if results.scores is not None else []
    slow_disk = warn_of_slow_disk(context.folder.steps)
    scored = results.scores.notes if results.scores is not None else ()
    untrained = warn_of_untrained_layers(results.pruned.records)
    few_tokens = warn_of_experts_without_refit(results.pruned.records)
    warnings = [*notes, *about_rounds(context.earlier), *context.batches.reductions, *scored, *unrouted]
    warnings += [*few_tokens, *chosen.warnings, *slow_disk, *untrained]
    warnings += warn_of_fixed_order(context.recipe.sparsity, results.pruned.records)
    settled = settle_patterns(warnings, context.inputs.anatomy.patterns, keep=chosen.cut.layers)
    return (*settled, *_about_heads(context.whole_plan.prediction_heads, results.pruned), *results.measured.warnings)


def _about_heads(planned: PredictionHeads | None, pruned: PrunedCheckpoint) -> list[str]:
    """Return a sentence on prediction heads, where the plan's notes do not have it."""
    if pruned.heads is not None:
        return [] if pruned.heads == planned else [describe_prediction_heads(pruned.heads)]
    return [describe_heads(pruned.left_heads)] if pruned.left_heads else []


def warn_of_untrained_layers(records: Sequence[LayerRecord]) -> list[str]:
    """Return a warning where ``refit.block`` could not train some layers."""
    layers = [record.layer for record in records if record.block is not None and record.block.steps is None]
    if not layers:
        return []
    return [
        f"refit.block: layers {ranges(layers)} were not trained, for they cannot be differentiated; they keep their "
        "closed-form repair"
    ]


def warn_of_fixed_order(sparsity: Sparsity | None, records: Sequence[LayerRecord]) -> list[str]:
    """Return a warning where ``sparsity.permute`` asks for an order and no matrix has a free one."""
    if sparsity is None or not sparsity.permute or any(one.permuted for record in records for one in record.matrices):
        return []
    return [
        "sparsity.permute: no sparse matrix has inputs whose order is free; MLP neurons (without stacked experts) and "
        "value channels have, in their output projections"
    ]
