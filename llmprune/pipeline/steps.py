"""The steps of one run, or of one of its rounds, in their order: from the scores to the report."""

from __future__ import annotations

from dataclasses import replace

from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.progress import report_progress
from llmprune.common.timeline import LAST
from llmprune.cut.decision import Cut
from llmprune.data.recovery_windows import RecoveryWindows
from llmprune.pipeline.calibration_check import check_calibration
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.evaluate import evaluate
from llmprune.pipeline.export import export_as_requested
from llmprune.pipeline.finish import push_as_requested, write_report
from llmprune.pipeline.options import RunOptions
from llmprune.pipeline.prune_checkpoint import PrunedCheckpoint, prune_checkpoint
from llmprune.pipeline.recover import RecoveredCheckpoint, recover_checkpoint
from llmprune.pipeline.recovery_windows import windows_of_tokens
from llmprune.pipeline.report.compose_report import compose_report
from llmprune.pipeline.report.run_results import RunResults
from llmprune.pipeline.requantize import requantize_as_requested
from llmprune.pipeline.score_and_select import find_cut, find_scores
from llmprune.pipeline.self_generated import add_self_generated
from llmprune.pipeline.source_check import check_sources, compares_sources
from llmprune.pipeline.step_costs import time_dense_forward_pass
from llmprune.pipeline.vocabulary import cut_vocabulary
from llmprune.publish.generated_windows import GENERATED, GENERATED_FOR_RECOVERY
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.replacing import remove


def run_steps(context: RunContext, options: RunOptions) -> Report:
    """Make every product of one round."""
    if context.search is None or options.search is not None:  # a search in this folder has added them
        add_self_generated(context, options.generated.get(GENERATED))
    lessons = windows_of_tokens(context, options.generated.get(GENERATED_FOR_RECOVERY))
    context.batches.settle(context.recipe, context.folder, sizes=context.plan.batch_sizes)
    if options.measure_forward:
        time_dense_forward_pass(context)
    scores = find_scores(context)
    chosen = find_cut(context, scores)
    stability = check_calibration(context) if options.calibration_check and not compares_sources(context) else None
    sources = check_sources(context, scores, cut=chosen.cut, asked=options.calibration_check)
    pruned, recovered = _pruned_model(context, chosen.cut, windows=lessons)
    if recovered is not None and pruned is not None:
        pruned = replace(pruned, verified=recovered.verified)
    vocabulary = cut_vocabulary(context, chosen.cut, pruned=pruned)
    if vocabulary is not None:
        pruned = vocabulary.pruned
    assert pruned is not None, "something is cut"
    if options.measure_forward:
        time_dense_forward_pass(context)  # a second time, because the speed of a machine drifts
    measured = evaluate(context, chosen.cut)
    report_progress(LAST)
    results = RunResults(
        scores,
        chosen,
        stability,
        sources,
        pruned,
        measured,
        recovery=recovered.figures if recovered else None,
        vocabulary=vocabulary.with_bits(measured.bits_per_byte) if vocabulary else None,
    )
    report = broadcast_from_first(compose_report(context, results))
    write_report(context.folder, report)
    report = requantize_as_requested(context, export_as_requested(context, report))
    if context.earlier and context.among and is_first_process():
        remove(context.among.predictions)
    return push_as_requested(context.whole_recipe, context.folder, report=report)


def _pruned_model(
    context: RunContext, cut: Cut, *, windows: RecoveryWindows | None
) -> tuple[PrunedCheckpoint | None, RecoveredCheckpoint | None]:
    """Make the model with all layers cut and trained; the first is None where only the base's vocabulary is cut."""
    if context.recipe.cuts_only_vocabulary:
        return None, None
    pruned = prune_checkpoint(context, cut)
    return pruned, recover_checkpoint(context, cut, repaired=pruned, windows=windows)
