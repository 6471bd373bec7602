"""Training of the repaired checkpoint in a run: its text, the recovery itself, and the verified model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.checkpoint.placement import free_on_all_gpus
from llmprune.checkpoint.result.pruned_source import pruned_source
from llmprune.checkpoint.result.verify import Verified
from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.energy import EnergyMeter, total_kilowatt_hours
from llmprune.common.errors import OutputError
from llmprune.common.files import replace_folder
from llmprune.common.out_of_memory import BatchSize, free_cached_memory
from llmprune.cut.decision import Cut
from llmprune.data.recovery_windows import RecoveryWindows
from llmprune.data.window_sources import SELF_GENERATED, distinct_names
from llmprune.data.windows import fingerprint_tokens
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.prune_checkpoint import PrunedCheckpoint, name_before_vocabulary
from llmprune.pipeline.recovery_windows import recovery_windows
from llmprune.pipeline.step_costs import measure_step
from llmprune.pipeline.verify_saved import SavedModel, verify_saved
from llmprune.planning.duration.recovering import VERIFIED_AGAIN
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recover import Recover, SelfGenerated
from llmprune.recover.arithmetic import Arithmetic
from llmprune.recover.beside import MatchingLayers, layers_after
from llmprune.recover.recovery import Recovered, Recovery
from llmprune.recover.timing import windows_in
from llmprune.recover.training import MOST_SETBACKS
from llmprune.results.figures.calibration import CalibrationSource
from llmprune.results.figures.recovery import RecoveryFigures
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import RECOVERY, RECOVERY_LENGTH, RECOVERY_STATE, REPAIRED, ROUNDS


@dataclass(frozen=True)
class RecoveredCheckpoint:
    """Facts about the trained checkpoint, kept as ``recovery.json`` in the run folder."""

    figures: RecoveryFigures
    verified: Verified

    def to_json(self) -> str:
        """Serialise for the product file."""
        return json.dumps({"figures": self.figures.model_dump(), "verified": asdict(self.verified)}) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> RecoveredCheckpoint:
        """Read the product file."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(RecoveryFigures.model_validate(values["figures"]), Verified.from_dict(values["verified"]))


def recover_checkpoint(
    context: RunContext, cut: Cut, *, repaired: PrunedCheckpoint, windows: RecoveryWindows | None
) -> RecoveredCheckpoint | None:
    """Train the run's ``repaired`` checkpoint into its ``model`` and verify it; or reuse the one in the run folder.

    None without ``recover`` in the recipe. ``windows``: to train on; None where the recipe gives hours, from which
    their number follows. Raises TrainingStopped after Ctrl-C, with the state of the training saved;
    VerificationError where the saved model differs from the trained one.
    """
    recipe, inputs, folder = context.recipe, context.inputs, context.folder
    if recipe.recover is None:
        return None
    before = file_fingerprint(folder.path / "pruning.json")
    source = pruned_source(recipe.model, folder.path / REPAIRED, layers=cut.layers)
    if windows is None:
        number = _windows_in_hours(context, source, before=fingerprint(inputs.identity, before))
        windows = recovery_windows(context, most=number)
    tokens = [fingerprint_tokens(part) for part in (windows.train_NL[windows.order_M], windows.held_out_NL)]
    settings = recipe.recover.model_dump_json(exclude={"data", "hours", "checkpointing"})
    origin = fingerprint(inputs.identity, before, settings, *tokens, recipe.export.max_shard_size)
    step = _RecoveryStep(context, cut, repaired, recipe.recover, windows, origin, source)

    result = folder.path / name_before_vocabulary(recipe)
    if is_first_process() and not (result / "config.json").is_file():
        (folder.path / RECOVERY).unlink(missing_ok=True)
    recovered = folder.produce(
        "recovery", origin, file=RECOVERY, load=RecoveredCheckpoint.from_json, make=step.make, together=True
    )
    if is_first_process():
        shutil.rmtree(folder.path / RECOVERY_STATE, ignore_errors=True)
    if not recipe.vocabulary:
        folder.take_over()
    return recovered


def is_begun(folder: Path) -> bool:
    """Check that a training was begun in a run folder, and not finished."""
    return (folder / RECOVERY_STATE).is_dir()


def require_begun(output: Path) -> None:
    """Raise OutputError where no training was begun in a run folder, nor in one of its rounds."""
    if not (any(map(is_begun, (output, *output.glob(f"{ROUNDS}/*")))) or (output / RECOVERY).is_file()):
        raise OutputError(
            f"--end-recovery takes the best weights of a training, and none was begun in {output}; leave the option "
            "out, or name that run's folder with --output"
        )


def _windows_in_hours(context: RunContext, source: ModelSource, *, before: str) -> int:
    """Return how many windows can be trained on in the recipe's hours; measured once, and kept for a continued run."""
    settings, inputs = context.recipe.recover, context.inputs
    assert settings is not None
    assert settings.hours is not None, "without tokens there are hours"
    hours, length = settings.hours, inputs.texts.recovery_settings.sequence_length or 0
    sample_NL = inputs.texts.text_windows[:, :length]

    plan = context.plan.recovery
    assert plan is not None, "the plan of a recipe with recover has it too"

    def make(path: Path) -> int:
        number = windows_in(
            hours,
            source,
            settings=settings,
            arithmetic=_arithmetic(context),
            sample_NL=sample_NL,
            dense_pass=plan.dense_pass,
        )
        context.folder.write(path.name, f"{number}\n")
        return number

    return context.folder.produce(
        "recovery length",
        fingerprint(before, settings.model_dump_json()),
        file=RECOVERY_LENGTH,
        load=lambda path: int(path.read_text(encoding="ascii")),
        make=make,
        together=True,
    )


def _arithmetic(context: RunContext) -> Arithmetic:
    """Return the arithmetic of the training, with activations kept or not, as the first process has planned."""
    settings, plan = context.recipe.recover, context.plan.recovery
    assert settings is not None, "the recipe has the section"
    assert plan is not None, "the plan of such a recipe has it too"
    return Arithmetic.here(settings.precision, save_memory=broadcast_from_first(plan.checkpointing))


@dataclass(frozen=True)
class _RecoveryStep:
    """The recovery of one run."""

    context: RunContext
    cut: Cut
    repaired: PrunedCheckpoint
    settings: Recover
    windows: RecoveryWindows
    origin: str
    source: ModelSource

    def make(self, path: Path) -> RecoveredCheckpoint:
        """Train, verify and write everything."""
        context, folder, windows = self.context, self.context.folder, self.windows
        trained = windows.order_M.numel() * windows.train_NL.shape[1]
        with measure_step(folder.steps, "recovery", tokens=trained), EnergyMeter() as meter:
            found = self._recovery().run()
        context.inputs.release()
        free_cached_memory()
        verified = self._verified(found)
        figures = self._figures(found, kilowatt_hours=total_kilowatt_hours(meter))
        made = RecoveredCheckpoint(figures, verified)
        if is_first_process():
            self._put_in_place(found)
            folder.write(path.name, made.to_json())
        return made

    def _recovery(self) -> Recovery:
        context, windows = self.context, self.windows
        arithmetic = _arithmetic(context)
        size = self.settings.windows_at_once(windows.train_NL.shape[1], on_gpu=arithmetic.device.type == "cuda")
        return Recovery(
            self.source,
            lambda: context.inputs.reference,
            context.inputs.reference_model.identity,
            windows,
            self.settings,
            context.folder.path / RECOVERY_STATE,
            self.origin,
            arithmetic,
            batch=context.batches.calibration,
            micro_batch=BatchSize(size, reductions=context.batches.calibration.reductions),
            max_shard_size=context.recipe.export.max_shard_size,
            matching=self._matching(),
            end=context.end_recovery,
            predictions=context.among.predictions if context.among else None,
        )

    def _matching(self) -> MatchingLayers | None:
        """Return which layers' hidden states are compared; None where none are."""
        inputs, among, weight = self.context.inputs, self.context.among, self.settings.hidden_states
        if not weight:
            return None
        layers = len(inputs.reference)
        kept = among.kept(self.cut.layers) if among else self.cut.layers
        return MatchingLayers(inputs.reference_model.open, layers_after(kept, layers), weight, self.cut.hidden)

    def _verified(self, found: Recovered) -> Verified:
        """Return the measurements of the fresh process; those of the repaired model where that remains."""
        free, verified = free_on_all_gpus(), None
        if found.folder is None or found.probe is None:
            return self.repaired.verified
        if is_first_process():
            with measure_step(self.context.folder.steps, VERIFIED_AGAIN):
                parameters, records = self.repaired.size.parameters, self.repaired.records
                saved = SavedModel(found.folder, found.probe, open_decoder(self.source), parameters, records)
                verified = verify_saved(self.context, self.cut, saved=saved, free=free)
        verified = broadcast_from_first(verified)
        assert verified is not None, "the first process verifies or raises"
        return verified

    def _put_in_place(self, found: Recovered) -> None:
        """Make the trained checkpoint the run's model; or a copy of the repaired one, where that is as good."""
        folder = self.context.folder.path
        staging = found.folder
        if staging is None:
            staging = folder / RECOVERY_STATE / "checkpoint"
            shutil.rmtree(staging, ignore_errors=True)
            shutil.copytree(folder / REPAIRED, staging)
        replace_folder(staging, folder / name_before_vocabulary(self.context.recipe))

    def _figures(self, found: Recovered, *, kilowatt_hours: float | None) -> RecoveryFigures:
        progress, windows = found.progress, self.windows
        step_tokens = found.course.order_SW.shape[1] * windows.train_NL.shape[1]
        return RecoveryFigures(
            against=self.settings.against,
            method=self.settings.method,
            loss=self.settings.loss,
            steps=progress.step,
            tokens=progress.step * step_tokens,
            batch_tokens=step_tokens,
            learning_rate=found.course.rate,
            sources=self._sources(),
            generated=own.samples if isinstance(own := self.settings.data.self_generated, SelfGenerated) else 0,
            dense_perplexity=found.dense_perplexity,
            checks=progress.checks,
            best_step=progress.best_step if found.folder else 0,
            seconds=round(progress.seconds, 3),
            kilowatt_hours=kilowatt_hours,
            setbacks=progress.setbacks,
            notes=(*windows.notes, *_notes(found)),
        )

    def _sources(self) -> tuple[CalibrationSource, ...]:
        """Return the sources that were trained on; windows that are repeated count each time."""
        windows, settings = self.windows, self.context.inputs.texts.recovery_settings
        texts = settings.text_sources()
        known = dict(zip(distinct_names(texts), texts, strict=True))
        commits, length = self.context.inputs.dataset_commits, windows.train_NL.shape[1]
        counted = Counter(windows.train_sources_N[windows.order_M].tolist())
        found = []
        for index, name in enumerate(windows.names):
            source = CalibrationSource(name=name, windows=counted[index], tokens=counted[index] * length)
            if name in known:
                source = source.with_origin(known[name], commit=commits.get(known[name].dataset))
            elif name != SELF_GENERATED:
                source = source.model_copy(update={"text": settings.tokens})
            found.append(source)
        return tuple(found)


def _notes(found: Recovered) -> list[str]:
    """Return notes on a training that ended early or that helped nothing."""
    notes = []
    if found.ended and found.progress.step < found.course.steps:
        notes.append(
            f"the training was ended with --end-recovery after {found.progress.step:,} of {found.course.steps:,} steps"
        )
    if found.progress.setbacks > MOST_SETBACKS:
        notes.append(
            f"the loss exploded {found.progress.setbacks} times, at last with {found.progress.scale:g} times the "
            "learning rate; the training was ended: set a lower recover.learning_rate"
        )
    if found.folder is None:
        notes.append(
            "the training brought the model no nearer to the dense one on held-out windows: the repaired weights "
            "remain; try a lower recover.learning_rate, more tokens, or text that is more like the use"
        )
    return notes
