"""The story of one run: recipe → plan → scores → cut → checkpoint → verified → report."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llmprune.anatomy.projections import projections_of
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.config_file import ConfigChange
from llmprune.checkpoint.loading import dense_decoder, load_config, load_model, place_of, tensors_of
from llmprune.checkpoint.prediction_heads import describe_heads
from llmprune.checkpoint.saving import CheckpointWriter
from llmprune.checkpoint.verify import Probe, SparseClaim, Verified, verify
from llmprune.common.distributed import count, from_first, in_step, is_first, launched, local_device
from llmprune.common.errors import GateNotMet, ModelError
from llmprune.common.files import publish, require_space, size_of
from llmprune.common.hub.client import guard_logs
from llmprune.common.progress import quiet_libraries, tell
from llmprune.common.versions import now
from llmprune.cut.apply import cut_config, cut_decoder, restore_layer
from llmprune.cut.decision import Cut
from llmprune.data.windows import fingerprint_tokens
from llmprune.evaluation.evaluate import Measured, measure
from llmprune.evaluation.gate import judge
from llmprune.evaluation.lm_eval.harness import subject
from llmprune.evaluation.lm_eval.tasks import fetch_tasks
from llmprune.evaluation.retention import CONFIDENCE, compare
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.pipeline.agreement import require_same_everywhere
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.report import layer_figures, provenance, sparsity_figures, unrouted, verification_figures
from llmprune.pipeline.score_and_select import check_calibration, find_cut, find_scores, require_halves
from llmprune.pipeline.step_costs import FORWARD, account, compare_with_forward, plain_forward
from llmprune.planning.interop import settle_patterns
from llmprune.planning.model_size import measure_size
from llmprune.planning.plan import Plan, survey
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.snapshots import Snapshots
from llmprune.publish.gate import refusal
from llmprune.publish.preflight import look
from llmprune.publish.push import publish_once, refuse_fewer_samples
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe, refuse_tokens
from llmprune.recipe.sparsity import Sparsity
from llmprune.report.html.page import render_page
from llmprune.results.formatting import describe_verdict
from llmprune.results.replacing import recipe_of_model
from llmprune.results.run_folder import TASKS, TRAIL, RunFolder, bytes_at_hand, file_fingerprint, fingerprint
from llmprune.results.schema import BaseFiles, Report, Size, StabilityFigures
from llmprune.score.scores import Scores
from llmprune.sparsity.pattern import ROUNDING

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What pass 2 and the verification left, beside the checkpoint itself."""

    records: tuple[LayerRecord, ...]
    verified: Verified
    size: Size
    left_heads: tuple[str, ...]  # config fields that count prediction heads, found by the tensors in the base's files
    base_files: BaseFiles

    def to_json(self) -> str:
        """As text, for the product file."""
        text = {
            "records": [asdict(record) for record in self.records],
            "verified": asdict(self.verified),
            "size": self.size.model_dump(),
            "left_heads": self.left_heads,
            "base_files": self.base_files.model_dump(),
        }
        return json.dumps(text) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Pruned:
        """Read the product file."""
        text = json.loads(path.read_text(encoding="utf-8"))
        records = tuple(LayerRecord.from_dict(record) for record in text["records"])
        verified, size = Verified.from_dict(text["verified"]), Size(**text["size"])
        return cls(records, verified, size, tuple(text["left_heads"]), BaseFiles(**text["base_files"]))


def run(
    recipe: Recipe,
    output: str | Path = "runs/llmprune",
    *,
    fresh: bool = False,
    measure_forward: bool = False,
    calibration_check: bool = False,
) -> Report:
    """Prune as the recipe says, into the folder ``output``; what is done there already is not done again.

    Under torchrun every process calls it and gets the report. ``measure_forward`` also times plain forward
    passes over the calibration tokens, to compare with; ``calibration_check`` also chooses by each half of them, and
    says how far the choices agree. Raises LLMPruneError in its kinds; GateNotMet only after the report is written.
    """
    quiet_libraries()
    guard_logs()
    with in_step():
        report, folder = _run_in_step(
            recipe, Path(output), fresh=fresh, measure_forward=measure_forward, calibration_check=calibration_check
        )
    require_gate(report, recipe, folder=folder)
    return report


def _run_in_step(
    recipe: Recipe, output: Path, *, fresh: bool, measure_forward: bool, calibration_check: bool
) -> tuple[Report, Path]:
    """The report of a run, and the folder that it is in."""
    refuse_tokens(recipe.text, recipe.overrides, source="recipe")
    surveyed = survey(recipe)
    plan, anatomy = surveyed.require()
    if is_first():
        if recipe.hub:
            look(recipe.hub)
        if calibration_check:
            require_halves(recipe)
        fetch_tasks(recipe.evaluation)
        require_space(output, _disk(plan), written=bytes_at_hand(output, fresh=fresh))
        # worth seeing under a launcher: accelerate launch --cpu --num_processes 2 starts one process and says nothing
        level = logging.WARNING if launched() else logging.INFO
        logger.log(level, "walking in %d process%s on %s", count(), "" if count() == 1 else "es", local_device())
    folder = RunFolder.open(output, fresh, model=recipe.model.id, recipe=recipe_of_model(recipe))
    bench = RunInputs(recipe, anatomy, inputs=surveyed.inputs, reserve=_disk(plan))
    try:
        report = _run(
            recipe,
            plan,
            bench=bench,
            folder=folder,
            measure_forward=measure_forward,
            calibration_check=calibration_check,
        )
    finally:
        folder.close()
    return report, folder.path


def require_gate(report: Report, recipe: Recipe, *, folder: Path) -> None:
    """Raise GateNotMet unless the report's gate is passed or there is none."""
    if report.gate is None or report.gate.passed:
        return
    unsent = (
        "" if recipe.hub is None or recipe.hub.when == "always" else f"nothing was pushed to {recipe.hub.repo_id}; "
    )
    raise GateNotMet(f"{describe_verdict(report.gate)}; {unsent}see {folder / 'report.html'}", report)


def _run(
    recipe: Recipe, plan: Plan, *, bench: RunInputs, folder: RunFolder, measure_forward: bool, calibration_check: bool
) -> Report:
    tell("reading text")
    bench.read_texts()
    require_same_everywhere(recipe, plan, bench=bench)
    folder.begin(recipe_of_model(recipe), fingerprint(bench.identity, bench.windows_fingerprint))
    if is_first() and folder.path != folder.home:  # the finished run stays meanwhile
        require_space(folder.home, _disk(plan), written=size_of(folder.path))
    folder.write("recipe.yaml", recipe.text)
    folder.write("plan.json", plan.model_dump_json(indent=1) + "\n")
    warnings = list(plan.notes)
    if measure_forward:
        plain_forward(bench.model, bench.windows[: count()], batch_size=1)  # the first run brings weights from disk
        _time_forward(recipe, bench, folder=folder)
    scores = find_scores(recipe, plan, bench=bench, folder=folder)
    if scores is not None:
        warnings += unrouted(scores)
    cut = find_cut(recipe, plan, bench=bench, folder=folder, scores=scores, warnings=warnings)
    warnings = settle_patterns(warnings, bench.anatomy.patterns, keep=cut.layers)
    stability = check_calibration(recipe, plan, bench=bench, folder=folder) if calibration_check else None
    pruned = _prune(recipe, bench, folder=folder, cut=cut)
    if measure_forward:
        _time_forward(recipe, bench, folder=folder)  # again, for a machine's speed drifts
    measured = _measure(recipe, bench, folder=folder, cut=cut)
    report = from_first(
        _report(
            recipe,
            plan,
            bench=bench,
            folder=folder,
            scores=scores,
            cut=cut,
            stability=stability,
            pruned=pruned,
            measured=measured,
            warnings=warnings,
        )
    )
    folder.write("report.json", report.model_dump_json(indent=1) + "\n")
    folder.write("report.html", render_page(report))
    return push_as_asked(recipe, folder, report=report)


def _disk(plan: Plan) -> int:
    """Bytes of disk that a run needs: the result in parts and joined, and the streams of its snapshots."""
    return 2 * plan.disk + 2 * plan.memory.streams


def _time_forward(recipe: Recipe, bench: RunInputs, *, folder: RunFolder) -> None:
    with account(folder.steps, FORWARD, tokens=bench.windows.numel()):
        plain_forward(bench.model, bench.windows, batch_size=recipe.calibration.batch_size)


def push_as_asked(recipe: Recipe, folder: RunFolder, *, report: Report) -> Report:
    """To the hub, where the recipe says so and the gate does not forbid it; the report then names the place."""
    if recipe.hub is None or (recipe.hub.when != "always" and refusal(report)):
        return report
    published = publish_once(folder, recipe, hub=recipe.hub, report=report)
    report = report.model_copy(update={"files": report.files | {"hub": published.url}})
    folder.write("report.json", report.model_dump_json(indent=1) + "\n")
    return report


def _prune(recipe: Recipe, bench: RunInputs, *, folder: RunFolder, cut: Cut) -> Pruned:
    """Pass 2, the checkpoint, and its proof."""
    staging = folder.path / "model.partial"
    cut_files = file_fingerprint(folder.path / "cut.json", folder.path / "cut.safetensors")
    settings = recipe.calibration.batch_size, recipe.sparsity, recipe.refit, recipe.export
    origin = fingerprint(bench.identity, bench.windows_fingerprint, cut_files, *settings)

    def make(path: Path) -> Pruned:
        made = _write_checkpoint(recipe, bench, folder=folder, cut=cut, snapshots=Snapshots(staging, origin))
        if is_first():
            publish(staging / "checkpoint", folder.path / "model")
            folder.write(path.name, made.to_json())
        return made

    if is_first() and not (folder.path / "model" / "config.json").is_file():
        (folder.path / "pruning.json").unlink(missing_ok=True)
    pruned = folder.produce("model", origin, file="pruning.json", load=Pruned.from_json, make=make, together=True)
    if is_first():
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(folder.path / TRAIL, ignore_errors=True)
    folder.take_over()
    return pruned


def _write_checkpoint(recipe: Recipe, bench: RunInputs, *, folder: RunFolder, cut: Cut, snapshots: Snapshots) -> Pruned:
    pruned = cut_decoder(bench.dense, bench.model, anatomy=bench.anatomy, cut=cut)
    anatomy = bench.anatomy
    experts = cut.num_experts or (anatomy.experts.count if anatomy.experts else None)
    kv_groups = cut.kv_groups or (anatomy.heads.count if anatomy.heads else None)
    size = measure_size(
        pruned.skeleton,
        anatomy.widths | cut.widths,
        experts=experts,
        kv_groups=kv_groups,
        stored=bench.saved_dtypes,
        layers=cut.layers,
    )
    change = _config_change(recipe, anatomy, cut=cut)
    writer = CheckpointWriter(snapshots.folder, pruned.skeleton, layers_path=pruned.layers_path, change=change)
    originals = bench.originals

    def write(new: int, tensors: Tensors) -> None:
        stored = (
            restore_layer(tensors, originals, anatomy=anatomy, cut=cut, layer=cut.layers[new]) if originals else tensors
        )
        writer.write_layer(new, stored)

    pruning = Pruning(
        bench.dense, pruned, anatomy=anatomy, cut=cut, refit=recipe.refit, write=write, sparsity=recipe.sparsity
    )
    with account(folder.steps, "pass 2", tokens=bench.windows.numel()):
        batch_size = recipe.calibration.batch_size
        store = bench.store(folder.path)
        records, walk = pruning.run(
            bench.windows, batch_size, snapshots=snapshots, store=store, sources_N=bench.sources
        )
    verified = None
    if is_first():
        probe = Probe.take(walk)
        with account(folder.steps, "saving"):
            rest = tensors_of(pruned.skeleton, skip=pruned.layers_path)
            writer.write_rest(originals.restore(rest, "", cut=lambda read: read) if originals else rest)
            writer.finish(recipe.export.max_shard_size, bench.tokenizer)
        with account(folder.steps, "verification"):
            trust = recipe.model.trust_remote_code
            claim = _claim(recipe.sparsity, pruned, records=records) if recipe.sparsity else None
            verified = verify(
                writer.folder,
                probe,
                parameters=size.parameters,
                dtype=bench.model.dtype,
                trust_remote_code=trust,
                claim=claim,
            )
    verified = from_first(verified)
    assert verified is not None, "the first process verifies or raises"
    return Pruned(tuple(records), verified, size, tuple(writer.left_heads), _files_of_base(writer))


def _config_change(recipe: Recipe, anatomy: Anatomy, *, cut: Cut) -> ConfigChange:
    """The base's config, read anew from its folder, and what the cut makes of it."""
    trusted = recipe.model.trust_remote_code
    before = load_config(recipe.model)
    after = cut_config(
        before, anatomy, layers=cut.layers, widths=cut.widths, num_experts=cut.num_experts, kv_groups=cut.kv_groups
    )
    return ConfigChange(place_of(recipe.model, "weights"), before, after, cut.layers, trusted)


def _files_of_base(writer: CheckpointWriter) -> BaseFiles:
    return BaseFiles(carried=writer.companions.carried, left=writer.companions.left)


def _claim(sparsity: Sparsity, pruned: Decoder, *, records: Sequence[LayerRecord]) -> SparseClaim:
    """What the saved file must hold. Raises ModelError where no matrix could be made sparse."""
    matrices = []
    weights = 0
    for index, record in enumerate(records):
        projections = {one.name: one for one in projections_of(pruned.layers[index])}
        for matrix in record.matrices:
            one = projections[matrix.name]
            matrices.append((f"{pruned.layers_path}.{index}.{one.name}", one.transposed))
            weights += one.outputs * one.inputs
    if not matrices:
        raise ModelError("no matrix was made sparse: this model calls none of them exactly once; remove sparsity")
    pattern = sparsity.parsed
    least = 0 if pattern.of else int(weights * (pattern.share - ROUNDING))
    return SparseClaim(tuple(matrices), weights, pattern.kept, pattern.of, least)


def _measure(recipe: Recipe, bench: RunInputs, *, folder: RunFolder, cut: Cut) -> Measured:
    """The dense model, the cut without refit, and the checkpoint as it was saved."""
    model_folder = folder.path / "model"

    def make(path: Path) -> Measured:
        source = pruned_source(recipe.model, model_folder)
        pruned = load_model(source)
        dense_subject = subject(recipe.model, bench.tokenizer, load=lambda: bench.model)
        pruned_subject = subject(source, bench.tokenizer, load=lambda: pruned, folder=folder.path / TASKS)
        cut_only = None
        if (recipe.refit or recipe.sparsity) and not cut.is_empty and recipe.evaluation.perplexity:
            cut_only = cut_decoder(bench.dense, bench.model, anatomy=bench.anatomy, cut=cut)
        decoders = (bench.dense, cut_only, dense_decoder(pruned))
        with account(folder.steps, "evaluation"):
            measured = measure(
                recipe.evaluation, dense_subject, pruned=pruned_subject, decoders=decoders, held_out_NL=bench.held_out
            )
        folder.write(path.name, measured.model_dump_json(indent=1) + "\n")
        return measured

    def load(path: Path) -> Measured:
        return Measured.model_validate_json(path.read_text(encoding="utf-8"))

    asked = recipe.evaluation.model_copy(update={"gate": None})
    if not (asked.perplexity or asked.tasks or asked.speed):
        return Measured()
    origin = fingerprint(
        bench.identity,
        file_fingerprint(folder.path / "pruning.json"),
        asked.model_dump_json(),
        fingerprint_tokens(bench.held_out) if bench.held_out is not None else None,
    )
    if is_first():
        refuse_fewer_samples(folder.path, asked.limit)
    return folder.produce("evaluation", origin, file="evaluation.json", load=load, make=make, together=True)


def pruned_source(base: ModelSource, folder: Path) -> ModelSource:
    """The checkpoint of a run as a model, loaded as its base is."""
    return base.model_copy(update={"id": str(folder.absolute()), "revision": ModelSource(id=str(folder)).revision})


def _report(
    recipe: Recipe,
    plan: Plan,
    *,
    bench: RunInputs,
    folder: RunFolder,
    scores: Scores | None,
    cut: Cut,
    stability: StabilityFigures | None,
    pruned: Pruned,
    measured: Measured,
    warnings: list[str],
) -> Report:
    records = {record.layer: record for record in pruned.records}
    gate, width = recipe.evaluation.gate, recipe.width
    add_up = (width.neurons_by.adds_up, width.heads_by.adds_up) if width else (True, True)
    comparison = compare(
        measured.dense_tasks, measured.pruned_tasks, confidence=gate.confidence if gate else CONFIDENCE
    )
    calibration = (bench.windows_fingerprint, bench.windows.numel(), bench.crossings)
    return Report(
        created=now(),
        recipe=recipe.model_dump(mode="json"),
        recipe_text=recipe.text,
        overrides=recipe.overrides,
        provenance=provenance(
            recipe.model.id,
            recipe.model.revision if bench.commit else None,
            commit=bench.commit,
            calibration=calibration,
            datasets=bench.dataset_commits,
            seed=recipe.calibration.seed,
            trust_remote_code=recipe.model.trust_remote_code,
            device=bench.device,
        ),
        dense=plan.dense,
        pruned=pruned.size,
        layers=layer_figures(bench.anatomy, scores, cut=cut, records=records, add_up=add_up),
        sparsity=sparsity_figures(
            recipe.sparsity, plan.sparsity.skipped if plan.sparsity else (), counts=pruned.verified.sparse
        ),
        stability=stability,
        perplexity=measured.perplexity,
        divergence=measured.divergence,
        tasks=comparison.tasks,
        groups=comparison.groups,
        mean_retention=comparison.mean.retention if comparison.mean else None,
        retention=comparison.mean,
        generation=measured.generation,
        speed=measured.speed,
        gate=judge(gate, comparison),
        verification=verification_figures(pruned.verified),
        steps=compare_with_forward(folder.steps),
        warnings=(*warnings, *([describe_heads(pruned.left_heads)] if pruned.left_heads else [])),
        base_files=BaseFiles(
            carried=pruned.base_files.carried,
            left=plan.base_files.left | pruned.base_files.left,  # of a hub model only the plan saw what was not fetched
        ),
        files={
            "model": str(folder.path / "model"),
            "report": str(folder.path / "report.html"),
            "figures": str(folder.path / "report.json"),
        },
    )
