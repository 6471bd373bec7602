"""Composition of a run's report from the results of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmprune.checkpoint.location import conversion_of, hub_commit, quantization_of_source
from llmprune.checkpoint.result.verify import SparseCounts, Verified
from llmprune.common.devices import device_name
from llmprune.common.distributed import local_device, world_size
from llmprune.common.versions import now, versions
from llmprune.data.begin_of_text import describe_begin
from llmprune.evaluation.evaluate import Measured
from llmprune.evaluation.gate import judge
from llmprune.evaluation.greedy_agreement import estimate_agreement
from llmprune.evaluation.recovery_scores import compare_recovery
from llmprune.evaluation.retention import CONFIDENCE, compare
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.report.composed_layers import compose_layers
from llmprune.pipeline.report.layer_rows import layer_figures
from llmprune.pipeline.report.round_figures import Round, round_figures, source_figures
from llmprune.pipeline.report.run_results import RunResults
from llmprune.pipeline.report.run_warnings import warnings_of
from llmprune.pipeline.step_costs import with_forward_ratios
from llmprune.prune.records import LayerRecord
from llmprune.recipe.evaluation import Gate
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.sparsity import Sparsity
from llmprune.results.figures.evaluation import AgreementFigures
from llmprune.results.figures.layers import SparsityFigures
from llmprune.results.figures.provenance import Provenance
from llmprune.results.figures.recovery import RecoveryFigures, RecoveryScores
from llmprune.results.figures.result_files import BaseFiles, VerificationFigures
from llmprune.results.report_schema import Report


def compose_report(context: RunContext, results: RunResults) -> Report:
    """Put the results of all steps together into the report."""
    recipe, plan, folder = context.whole_recipe, context.whole_plan, context.folder
    pruned, measured, generation = results.pruned, results.measured, results.measured.generation
    scores = judge_scores(measured, context.recipe.evaluation.gate)
    earlier, recovery = context.earlier.reports if context.earlier else (), _recovery_figures(recipe, results.recovery)
    skipped = plan.sparsity.skipped if plan.sparsity else ()
    layers = layer_figures(context, results)
    return Report(
        created=now(),
        recipe=recipe.model_dump(mode="json"),
        recipe_text=recipe.text,
        overrides=recipe.overrides,
        provenance=_provenance(context),
        dense=plan.dense,
        pruned=pruned.size,
        lineage=plan.lineage,
        layers=compose_layers([*(report.layers for report in earlier), layers]),
        vocabulary=results.vocabulary,
        sparsity=_sparsity_figures(recipe.sparsity, skipped, counts=pruned.verified.sparse, records=pruned.records),
        stability=results.stability,
        sources=source_figures(earlier, results.sources),
        recovery=recovery,
        search=context.search.reported if context.search else None,
        rounds=round_figures(earlier, Round(layers, pruned.size, recovery)) if earlier else (),
        perplexity=measured.perplexity,
        divergence=measured.divergence,
        generation=generation.model_copy(update={"agreement": scores.agreement}) if generation else None,
        speed=measured.speed,
        **scores.fields,
        verification=_verification_figures(pruned.verified),
        steps=with_forward_ratios(folder.steps),
        warnings=warnings_of(context, results),
        prediction_heads=pruned.heads,
        next_tools=plan.next_tools,
        base_files=_base_files(plan.base_files, pruned.base_files),
        files={
            "model": str(folder.path / "model"),
            "report": str(folder.path / "report.html"),
            "figures": str(folder.path / "report.json"),
        },
    )


def _recovery_figures(recipe: Recipe, recovery: RecoveryFigures | None) -> RecoveryFigures | None:
    """Return the figures of the training with the model that it was compared with, where that is not the recipe's."""
    if recovery is None or recipe.recover is None:
        return recovery
    against = recipe.reference.id if recipe.reference != recipe.model else None
    return recovery.model_copy(update={"against": against})


def _base_files(planned: BaseFiles, found: BaseFiles) -> BaseFiles:
    """Return what became of the base's files. Only the plan lists files of a hub model that were not fetched."""
    return BaseFiles(carried=found.carried, left=planned.left | found.left, rewritten=found.rewritten)


@dataclass(frozen=True)
class JudgedScores:
    """Greedy agreement, and the ``fields`` of a report about tasks, retention and the gate."""

    agreement: AgreementFigures | None
    fields: dict[str, Any]


def judge_scores(measured: Measured, gate: Gate | None) -> JudgedScores:
    """Compare the answers of both models, and judge them by the gate."""
    confidence = gate.confidence if gate else CONFIDENCE
    comparison = compare(measured.dense_tasks, measured.pruned_tasks, confidence=confidence)
    agreement = estimate_agreement(measured.agreement, confidence=confidence)
    fields = {
        "tasks": comparison.tasks,
        "groups": comparison.groups,
        "mean_retention": comparison.mean.retention if comparison.mean else None,
        "retention": comparison.mean,
        "recovery_scores": _recovery_scores(measured, confidence=confidence),
        "gate": judge(gate, comparison, agreement=agreement),
    }
    return JudgedScores(agreement, fields)


def _recovery_scores(measured: Measured, *, confidence: float) -> RecoveryScores | None:
    """Return the scores before and after the training; None where no task was evaluated before it."""
    if measured.repaired_tasks is None:
        return None
    before, after = measured.repaired_tasks, measured.pruned_tasks
    return compare_recovery(measured.dense_tasks, before, after=after, confidence=confidence)


def _sparsity_figures(
    sparsity: Sparsity | None, skipped: Sequence[str], *, counts: SparseCounts | None, records: Sequence[LayerRecord]
) -> SparsityFigures | None:
    """Return the zeros counted in the saved file. ``skipped``: matrices that the plan leaves dense."""
    if sparsity is None or counts is None:
        return None
    return SparsityFigures(
        pattern=str(sparsity.parsed),
        method=sparsity.method.kind,
        skipped=tuple(skipped),
        permuted=sum(matrix.permuted for record in records for matrix in record.matrices),
        **asdict(counts),
    )


def _verification_figures(verified: Verified) -> VerificationFigures:
    """Return the results of the fresh process; counts of sparse matrices have figures of their own."""
    return VerificationFigures(
        parameters=verified.parameters,
        largest_logit_difference=verified.largest_logit_difference,
        cached_generation_equal=verified.cached_generation_equal,
        positions=verified.positions,
    )


def _provenance(context: RunContext) -> Provenance:
    """Return the origin of the result: model, data, seed, machine and versions."""
    recipe, inputs = context.whole_recipe, context.inputs
    commit, quantization = hub_commit(recipe.model), quantization_of_source(recipe.model)
    text, conversion = inputs.calibration_text, conversion_of(recipe.model)
    return Provenance(
        model=recipe.model.id,
        adapter_base=conversion.base if conversion else None,
        revision=recipe.model.revision if commit else None,
        commit=commit,
        quantization=quantization.describe() if quantization else None,
        calibration_fingerprint=inputs.windows_fingerprint,
        calibration_tokens=inputs.windows.numel(),
        calibration_crossings=text.crossings,
        begin_of_text=describe_begin(text.begin, inputs.tokenizer),
        calibration_sources=inputs.calibration_sources,
        datasets=inputs.dataset_commits,
        seed=recipe.calibration.seed,
        trust_remote_code=recipe.model.trust_remote_code,
        device=device_name(local_device()),
        processes=world_size(),
        batch_size=context.batches.calibration.number,
        versions=versions(),
    )
