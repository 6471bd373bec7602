"""Composition of a run's report from the results of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from llmprune.anatomy.types import Anatomy, MlpUnit, unit_key
from llmprune.checkpoint.location import conversion_of, hub_commit, quantization_of_source
from llmprune.checkpoint.prediction_heads import describe_heads
from llmprune.checkpoint.verify import SparseCounts, Verified
from llmprune.common.devices import device_name
from llmprune.common.distributed import local_device, world_size
from llmprune.common.versions import now, versions
from llmprune.cut.decision import Cut, kept_share
from llmprune.data.begin_of_text import describe_begin
from llmprune.evaluation.evaluate import Measured
from llmprune.evaluation.gate import judge
from llmprune.evaluation.greedy_agreement import estimate_agreement
from llmprune.evaluation.recovery_scores import compare_recovery
from llmprune.evaluation.retention import CONFIDENCE, compare
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.expert_warnings import warn_of_experts_without_refit, warn_of_unrouted_experts
from llmprune.pipeline.prune_checkpoint import PrunedCheckpoint
from llmprune.pipeline.round_figures import Round, about_rounds, round_figures, source_figures
from llmprune.pipeline.score_and_select import ChosenCut
from llmprune.pipeline.step_costs import warn_of_slow_disk, with_forward_ratios
from llmprune.planning.tool_compatibility import settle_patterns
from llmprune.prune.records import LayerRecord
from llmprune.recipe.sparsity import Sparsity
from llmprune.results.composed_layers import compose_layers
from llmprune.results.formatting import ranges
from llmprune.results.prediction_heads import PredictionHeads, describe_prediction_heads
from llmprune.results.recovery_figures import RecoveryFigures, RecoveryScores
from llmprune.results.report_schema import (
    BaseFiles,
    BlockFigures,
    LayerFigures,
    MatrixFigures,
    Provenance,
    Report,
    SourceFigures,
    SparsityFigures,
    StabilityFigures,
    VerificationFigures,
)
from llmprune.results.vocabulary_figures import VocabularyFigures
from llmprune.score.scores import Scores


@dataclass(frozen=True)
class RunResults:
    """Results of the steps of a run."""

    scores: Scores | None
    chosen: ChosenCut
    stability: StabilityFigures | None
    sources: SourceFigures | None
    pruned: PrunedCheckpoint
    measured: Measured
    recovery: RecoveryFigures | None = None
    vocabulary: VocabularyFigures | None = None


def compose_report(context: RunContext, results: RunResults) -> Report:
    """Put the results of all steps together into the report."""
    recipe, plan, folder = context.whole_recipe, context.whole_plan, context.folder
    pruned, measured, gate = results.pruned, results.measured, context.recipe.evaluation.gate
    confidence = gate.confidence if gate else CONFIDENCE
    comparison = compare(measured.dense_tasks, measured.pruned_tasks, confidence=confidence)
    agreement = estimate_agreement(measured.agreement, confidence=confidence)
    generation = measured.generation
    earlier, recovery = context.earlier.reports if context.earlier else (), results.recovery
    if recovery is not None and recipe.recover is not None:
        against = recipe.reference.id if recipe.reference != recipe.model else None
        recovery = recovery.model_copy(update={"against": against})
    skipped = plan.sparsity.skipped if plan.sparsity else ()
    layers = _layer_figures(context, results)
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
        recovery_scores=recovery_scores(measured, confidence=confidence),
        perplexity=measured.perplexity,
        divergence=measured.divergence,
        tasks=comparison.tasks,
        groups=comparison.groups,
        mean_retention=comparison.mean.retention if comparison.mean else None,
        retention=comparison.mean,
        generation=generation.model_copy(update={"agreement": agreement}) if generation else None,
        speed=measured.speed,
        gate=judge(gate, comparison, agreement=agreement),
        verification=_verification_figures(pruned.verified),
        steps=with_forward_ratios(folder.steps),
        warnings=_warnings(context, results),
        prediction_heads=pruned.heads,
        next_tools=plan.next_tools,
        base_files=BaseFiles(
            carried=pruned.base_files.carried,
            left=plan.base_files.left | pruned.base_files.left,  # only the plan lists files of a hub model not fetched
            rewritten=pruned.base_files.rewritten,
        ),
        files={
            "model": str(folder.path / "model"),
            "report": str(folder.path / "report.html"),
            "figures": str(folder.path / "report.json"),
        },
    )


def recovery_scores(measured: Measured, *, confidence: float) -> RecoveryScores | None:
    """Return the scores before and after the training; None where no task was evaluated before it."""
    if measured.repaired_tasks is None:
        return None
    before, after = measured.repaired_tasks, measured.pruned_tasks
    return compare_recovery(measured.dense_tasks, before, after=after, confidence=confidence)


def _warnings(context: RunContext, results: RunResults) -> tuple[str, ...]:
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


def _layer_figures(context: RunContext, results: RunResults) -> tuple[LayerFigures, ...]:
    """Return one row for every layer of the dense model."""
    width, cut = context.recipe.width, results.chosen.cut
    rows = _LayerRows(
        anatomy=context.inputs.anatomy,
        scores=results.scores,
        cut=cut,
        records={record.layer: record for record in results.pruned.records},
        are_neurons_additive=width.neuron_criterion.is_additive if width else True,
        are_heads_additive=width.head_criterion.is_additive if width else True,
    )
    return tuple(rows.row(index) for index in range(cut.num_layers))


@dataclass(frozen=True)
class _LayerRows:
    """Rows of the layer table. ``records``: results of pass 2 by kept layer."""

    anatomy: Anatomy
    scores: Scores | None
    cut: Cut
    records: Mapping[int, LayerRecord]
    are_neurons_additive: bool
    are_heads_additive: bool

    def row(self, index: int) -> LayerFigures:
        """Return the figures of one layer of the dense model."""
        removed, units = index in self.cut.removed, self.anatomy.units[index]
        scores, record = self.scores, self.records.get(index)
        block, attention = self.anatomy.blocks[index], self.anatomy.attention[index]
        keep_E = self.cut.experts.get(unit_key(index, block.path)) if block else None
        heads = unit_key(index, attention.path) if attention else ""
        keep_G = None if removed else self.cut.heads.get(heads)
        return LayerFigures(
            layer=index,
            importance=float(scores.layers[index]) if scores and scores.layers is not None else None,
            removed=removed,
            width=sum(unit.width * (unit.experts or 1) for unit in units) if units else None,
            kept=sum(self._kept(index, unit, keep_E=keep_E) for unit in units) if units and not removed else None,
            experts_kept=None if keep_E is None or removed else tuple(keep_E.tolist()),
            kv_groups_kept=None if keep_G is None else tuple(keep_G.tolist()),
            kv_groups_share=None
            if keep_G is None or scores is None or scores.by_source
            else kept_share(scores.heads[heads], keep_G, is_additive=self.are_heads_additive),
            score_share=None if removed or scores is None or scores.by_source else self._score_share(index, scores),
            error_cut=record.error_cut if record else None,
            error_refit=record.error_refit if record else None,
            ridge=record.ridge if record else None,
            inherited=record.inherited if record else None,
            held_out=record.held_out if record else None,
            mixer_held_out=record.mixer_held_out if record else None,
            up_held_out=record.up_held_out if record else None,
            block=BlockFigures(**asdict(record.block)) if record and record.block else None,
            matrices=tuple(MatrixFigures(**asdict(one)) for one in record.matrices) if record else (),
        )

    def _kept(self, index: int, unit: MlpUnit, *, keep_E: Tensor | None) -> int:
        """Count the kept neurons of a unit, over all its kept experts. ``keep_E``: indices of kept experts."""
        keep = self.cut.neurons.get(unit_key(index, unit.path))
        experts = 1 if unit.experts is None else unit.experts if keep_E is None else len(keep_E)
        return experts * (unit.width if keep is None else keep.shape[-1])

    def _score_share(self, index: int, scores: Scores) -> float | None:
        """Mean share of the neurons' score that is kept, over the layer's units that lost neurons."""
        keys = [unit_key(index, unit.path) for unit in self.anatomy.units[index]]
        shares = [
            kept_share(scores.neurons[key], self.cut.neurons[key], is_additive=self.are_neurons_additive)
            for key in keys
            if key in self.cut.neurons
        ]
        return sum(shares) / len(shares) if shares else None


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
