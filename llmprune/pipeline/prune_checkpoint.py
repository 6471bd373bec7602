"""Pass 2 of a run, the checkpoint that it writes, and the verification of that checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmprune.anatomy.config_edits import count_heads_again, declared_heads
from llmprune.checkpoint.loading import load_config
from llmprune.checkpoint.location import folder_of
from llmprune.checkpoint.placement import free_on_all_gpus
from llmprune.checkpoint.result.config_file import ConfigChange
from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.checkpoint.result.verify import Probe, Verified
from llmprune.checkpoint.skeleton import tensors_of
from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.files import replace_folder
from llmprune.common.out_of_memory import free_cached_memory
from llmprune.cut.apply import cut_config, cut_decoder, cut_outside, narrow_decoder, restore_layer
from llmprune.cut.decision import Cut
from llmprune.cut.prediction_heads import HeadsDecision, decide_heads, stored_heads
from llmprune.layerwise.decoder import Tensors
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.step_costs import measure_step
from llmprune.pipeline.verify_saved import SavedModel, verify_saved
from llmprune.planning.prediction_heads import head_figures
from llmprune.planning.sizes.model_size import measure_size
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.repair.folds import Folds
from llmprune.prune.snapshots import Snapshots
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.model_size import Size
from llmprune.results.figures.prediction_heads import PredictionHeads
from llmprune.results.figures.result_files import BaseFiles
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import FULL_VOCABULARY, HIDDEN_STATES, REPAIRED


@dataclass(frozen=True)
class PrunedCheckpoint:
    """Facts about a saved and verified checkpoint, kept as ``pruning.json`` in the run folder.

    ``records``: results of pass 2, one for each kept layer. ``left_heads``: config fields that count prediction heads
    which the checkpoint does not have; ``heads``: what became of those in the base's files.
    """

    records: tuple[LayerRecord, ...]
    verified: Verified
    size: Size
    left_heads: tuple[str, ...]
    base_files: BaseFiles
    heads: PredictionHeads | None = None

    def to_json(self) -> str:
        """Serialise for the product file."""
        values = {
            "records": [asdict(record) for record in self.records],
            "verified": asdict(self.verified),
            "size": self.size.model_dump(),
            "left_heads": self.left_heads,
            "base_files": self.base_files.model_dump(),
            "heads": self.heads and self.heads.model_dump(),
        }
        return json.dumps(values) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> PrunedCheckpoint:
        """Read the product file."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrunedCheckpoint:
        """Read back what ``to_json`` wrote."""
        return cls(
            records=tuple(LayerRecord.from_dict(record) for record in values["records"]),
            verified=Verified.from_dict(values["verified"]),
            size=Size(**values["size"]),
            left_heads=tuple(values["left_heads"]),
            base_files=BaseFiles(**values["base_files"]),
            heads=PredictionHeads(**values["heads"]) if values["heads"] else None,
        )


def prune_checkpoint(context: RunContext, cut: Cut) -> PrunedCheckpoint:
    """Run pass 2, save the checkpoint and verify it; or reuse the one in the run folder.

    It is the run's ``model``, or with ``recover`` in the recipe the ``repaired`` model, which is trained next, or the
    model with its ``full-vocabulary``, which is cut next.

    Raises ModelError where no matrix can be made sparse, VerificationError where the saved model differs.
    """
    recipe, inputs, folder = context.recipe, context.inputs, context.folder
    staging = folder.path / "model.partial"
    cut_files = file_fingerprint(folder.path / "cut.json", folder.path / "cut.safetensors")
    settings = recipe.calibration.batch_size, recipe.sparsity, recipe.refit, recipe.export.max_shard_size
    result = folder.path / (REPAIRED if recipe.recover else name_before_vocabulary(recipe))
    folds = _folds(context)
    judged = (folds.of_windows_N.tolist(), folds.weights) if recipe.refit else None
    origin = fingerprint(inputs.identity, inputs.windows_fingerprint, judged, cut_files, *settings)

    def make(path: Path) -> PrunedCheckpoint:
        streams = ("dense", "pruned") if cut.hidden is None else ("dense", "pruned", "narrow")
        made = _CheckpointStep(context, cut, snapshots=Snapshots(staging, origin, streams=streams)).run()
        if is_first_process():
            replace_folder(staging / "checkpoint", result)
            folder.write(path.name, made.to_json())
        return made

    if is_first_process() and not (result / "config.json").is_file():
        (folder.path / "pruning.json").unlink(missing_ok=True)
    pruned = folder.produce(
        "model", origin, file="pruning.json", load=PrunedCheckpoint.from_json, make=make, together=True
    )
    if is_first_process():
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(folder.path / HIDDEN_STATES, ignore_errors=True)
    if not (recipe.recover or recipe.vocabulary):
        folder.take_over()
    return pruned


def name_before_vocabulary(recipe: Recipe) -> str:
    """Return the folder of the finished model, whose vocabulary may still be cut."""
    return FULL_VOCABULARY if recipe.vocabulary else "model"


def _folds(context: RunContext) -> Folds:
    inputs = context.inputs
    return Folds.of(inputs.windows, inputs.sources, generated_N=inputs.generated)


class _CheckpointStep:
    """Pass 2, saving and verification of one cut, in this order."""

    def __init__(self, context: RunContext, cut: Cut, *, snapshots: Snapshots) -> None:
        self.context, self.cut, self.snapshots = context, cut, snapshots
        inputs = context.inputs
        self.wide = self.pruned = cut_decoder(inputs.dense, anatomy=inputs.anatomy, cut=cut.with_all_channels)
        if cut.hidden is not None:
            self.pruned = narrow_decoder(self.wide, anatomy=inputs.anatomy, cut=cut)
        kept = cut.sizes.completed(inputs.anatomy)
        self.size = measure_size(self.pruned.skeleton, kept, stored=inputs.saved_dtypes)
        change, self.heads = _config_change(context, cut)
        self.writer = CheckpointWriter(
            snapshots.folder, self.pruned.skeleton, layers_path=self.pruned.layers_path, change=change
        )

    def run(self) -> PrunedCheckpoint:
        """Prune, save and verify; every process returns the same value.

        Where a device runs out of memory, pass 2 continues from its last snapshot with half the batch.
        """
        steps, inputs = self.context.folder.steps, self.context.inputs
        with measure_step(steps, "pass 2", tokens=inputs.windows.numel(), decoder=inputs.dense):
            records, probe = self.context.batches.calibration.run("pass 2", self._prune, release=self._evict)
        verified = None
        if is_first_process():
            with measure_step(steps, "saving"):
                self._save()
        self._free_devices()
        free = free_on_all_gpus()
        if probe is not None:
            with measure_step(steps, "verification"):
                saved = SavedModel(self.writer.folder, probe, self.pruned, self.size.parameters, tuple(records))
                verified = verify_saved(self.context, self.cut, saved=saved, free=free)
        verified = broadcast_from_first(verified)
        assert verified is not None, "the first process verifies or raises"
        selection = self.writer.selection
        return PrunedCheckpoint(
            records=tuple(records),
            verified=verified,
            size=self.size,
            left_heads=tuple(self.writer.left_heads),
            base_files=BaseFiles(carried=selection.copied, left=selection.left_out),
            heads=self._head_figures(),
        )

    def _head_figures(self) -> PredictionHeads | None:
        if self.heads is None:
            return None
        before = load_config(self.context.recipe.model)
        return head_figures(self.heads, tuple(sorted({*declared_heads(before.to_dict()), *self.writer.left_heads})))

    def _prune(self, batch_size: int) -> tuple[list[LayerRecord], Probe | None]:
        """Run pass 2; return a record for each kept layer, and in the first process the pruned model's probe."""
        recipe, inputs, folder = self.context.recipe, self.context.inputs, self.context.folder
        pruning = Pruning(
            inputs.dense,
            self.wide,
            anatomy=inputs.anatomy,
            cut=self.cut,
            refit=recipe.refit,
            write=self._write_layer,
            sparsity=recipe.sparsity,
            seed=recipe.calibration.seed,
            narrow=None if self.cut.hidden is None else self.pruned,
        )
        records, forward = pruning.run(
            inputs.windows,
            batch_size,
            snapshots=self.snapshots,
            store=inputs.hidden_state_store(folder.path, batch_size),
            folds=_folds(self.context),
        )
        return records, Probe.take(forward) if is_first_process() else None

    def _evict(self) -> None:
        """Drop the layers of both models before another attempt."""
        self.wide.release()
        self.pruned.release()
        self.context.inputs.evict()

    def _free_devices(self) -> None:
        """Drop the layers of both models, because the process that verifies needs the devices of all processes."""
        self.wide.release()
        self.pruned.release()
        self.context.inputs.release()
        free_cached_memory()

    def _write_layer(self, index: int, tensors: Tensors) -> None:
        """Write a pruned layer, with untouched tensors in the types of the base's files."""
        originals = self.context.inputs.originals
        if originals:
            anatomy, layer = self.context.inputs.anatomy, self.cut.layers[index]
            tensors = restore_layer(tensors, originals, anatomy=anatomy, cut=self.cut, layer=layer)
        self.writer.write_layer(index, tensors)

    def _save(self) -> None:
        """Write the tensors outside the layers, prediction heads, config and tokenizer."""
        inputs = self.context.inputs
        rest = tensors_of(self.pruned.skeleton, skip=self.pruned.layers_path)
        take = partial(cut_outside, anatomy=inputs.anatomy, cut=self.cut)
        self.writer.write_rest(inputs.originals.restore(rest, "", cut=take) if inputs.originals else rest)
        if self.heads is not None and self.heads.kept:
            anatomy, skeleton = inputs.anatomy, self.pruned.skeleton
            self.writer.write_heads(
                stored_heads(self.heads, inputs.reader, anatomy=anatomy, cut=self.cut, skeleton=skeleton)
            )
        self.writer.finish(self.context.recipe.export.max_shard_size, inputs.tokenizer)


def _config_change(context: RunContext, cut: Cut) -> tuple[ConfigChange, HeadsDecision | None]:
    """Return the base's config, read again from its folder, before and after the cut; and the decision on its heads."""
    source = context.recipe.model
    before = load_config(source)
    after = cut_config(before, context.inputs.anatomy, kept=cut.sizes)
    change = ConfigChange(folder_of(source, "weights"), before, after, cut.layers, source.trust_remote_code)
    counted = replace(change, after=count_heads_again(after, before), heads=True)
    decision = decide_heads(
        context.inputs.reader.names,
        change=counted,
        narrowed=bool(cut.widths or cut.num_experts or cut.kv_groups or cut.hidden_size),
        keep=context.recipe.export.prediction_heads == "keep",
    )
    return (counted if decision is not None and decision.kept else change), decision
