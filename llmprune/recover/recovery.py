"""Train a repaired checkpoint and write its best weights: the steps of a recovery in their order.

Each step leaves its result in a folder, so that a run that is killed goes on where it was.

Shapes: N windows, H held-out windows, L sequence length, S steps, W windows of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmprune.anatomy.meta_model import text_config
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.checkpoint.result.verify import Probe
from llmprune.common.distributed import rank, world_size
from llmprune.common.errors import DeviceMemoryError, OutputError, to_continue
from llmprune.common.out_of_memory import BatchSize, describe_shortage, is_out_of_memory
from llmprune.common.progress import track
from llmprune.data.recovery_windows import RecoveryWindows
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recover import Recover
from llmprune.recover.arithmetic import Arithmetic
from llmprune.recover.beside import DenseBeside, MatchingLayers
from llmprune.recover.course import Course
from llmprune.recover.held_out import HeldOut, Measured
from llmprune.recover.lessons import Lessons, windows_of_this_process
from llmprune.recover.save import RecoveredWriter, probe_of
from llmprune.recover.state import Progress, StateFolder
from llmprune.recover.student import Student
from llmprune.recover.teacher import StoredPredictions, TeacherSettings, store_predictions
from llmprune.recover.training import TRAINING, Training


@dataclass(frozen=True)
class Recovered:
    """Outcome of a recovery. ``folder``: the checkpoint; None where the repaired weights are as good.

    ``probe``: logits of the trained model in memory; ``dense_perplexity``: on the held-out windows, by source.
    ``ended``: the training was not to make all of its steps.
    """

    progress: Progress
    course: Course
    dense_perplexity: dict[str, float]
    folder: Path | None = None
    probe: Probe | None = None
    ended: bool = False


@dataclass(frozen=True)
class Recovery:
    """A recovery of the checkpoint ``repaired`` towards a dense model.

    ``dense``: opens the dense model, which ``dense_identity`` names. ``folder``, ``origin``: for the work files, and
    the fingerprint of what the training depends on. ``arithmetic``: of the training. ``batch``: windows of a layer-wise
    pass. ``micro_batch``: windows whose activations are in memory together. ``matching``: layers whose hidden states
    are compared. ``end``: make no more steps, but take the best weights that an earlier run has found. ``predictions``:
    folder for the dense model's predictions, which other recoveries share; None: a work folder.
    """

    repaired: ModelSource
    dense: Callable[[], Decoder]
    dense_identity: str
    windows: RecoveryWindows
    settings: Recover
    folder: Path
    origin: str
    arithmetic: Arithmetic
    batch: BatchSize
    micro_batch: BatchSize
    max_shard_size: int
    matching: MatchingLayers | None = None
    end: bool = False
    predictions: Path | None = None

    def run(self) -> Recovered:
        """Train, and write the best weights if they are better than the repaired ones; every process calls it.

        Raises TrainingStopped after Ctrl-C, with the state saved; OutputError where a training is to end that was not
        begun; DeviceError where several processes run out of memory.
        """
        windows = self.windows
        predictions = self._predictions(windows.held_out_NL, "held-out windows", quick=False)
        held_out = HeldOut(predictions, windows.held_out_sources_N, windows.names, windows.begin)
        lessons, course = self._lessons()
        found = self.micro_batch.run(TRAINING, lambda size: self._try(held_out, lessons, course=course, size=size))
        if found.folder is None:
            return found
        before, after = (self._measure_file(held_out, folder) for folder in (None, found.folder))
        return found if after.mean < before.mean else replace(found, folder=None, probe=None)

    def _lessons(self) -> tuple[Lessons, Course]:
        """Return what this process trains on, and the course of the training."""
        windows, settings = self.windows, self.settings
        length = windows.train_NL.shape[1]
        asked = settings.windows_of_step(len(windows.order_M) * length, length)
        each = -(-asked // world_size())  # windows of a step in each process
        hidden = text_config(self.dense().skeleton.config).hidden_size
        course = Course.of(settings, windows.order_M, windows_of_step=each * world_size(), hidden_size=hidden)
        own_NL, own_SW = windows_of_this_process(windows.train_NL, course.order_SW)
        if settings.loss == "language_model":
            return Lessons(own_NL, own_SW, None), course
        predictions = self._predictions(own_NL, "training windows", quick=True)
        return Lessons(own_NL, own_SW, predictions, settings.temperature), course

    def _predictions(self, windows_NL: Tensor, name: str, *, quick: bool) -> StoredPredictions:
        """Return the dense model's predictions, at temperature 1 and exact unless ``quick``."""
        temperature = self.settings.temperature if quick else 1.0
        quick = quick and self.arithmetic.quick

        def work(batch_size: int) -> StoredPredictions:
            settings = TeacherSettings(self.settings.top_k, temperature, batch_size, quick)
            part = settings.fingerprint(self.dense_identity, windows_NL)[:16]
            place = self.predictions or self.folder / "predictions"
            folder = place / f"{part}-{rank():05}"  # each process writes files of its own
            return store_predictions(self.dense(), windows_NL, folder=folder, settings=settings)

        return self.batch.run(f"recovery: predictions for {name}", work, release=lambda: self.dense().save_memory())

    def _try(self, held_out: HeldOut, lessons: Lessons, *, course: Course, size: int) -> Recovered:
        """Train. Several processes do not repeat it with less memory: FSDP2 has left the others in an exchange."""
        try:
            return self._train(held_out, lessons, course=course, size=size)
        except RuntimeError as error:
            if world_size() == 1 or not is_out_of_memory(error):
                raise
            place, _, cause = describe_shortage(error).partition("\n")
            fewer = f"set recover.data.batch_size: {size // 2}, which changes the result by rounding only"
            remedy = fewer if size > 1 else "set recover.method: lora, or a shorter recover.data.sequence_length"
            windows = "1 window" if size == 1 else f"{size} windows"
            raise DeviceMemoryError(
                f"{TRAINING} ran out of memory on {place} of process {rank()} with {windows} at a time ({cause}); "
                f"{remedy}, and {to_continue()}"
            ) from error

    def _train(self, held_out: HeldOut, lessons: Lessons, *, course: Course, size: int) -> Recovered:
        """Train with micro-batches of ``size`` windows, and write the best weights."""
        self.dense().release()
        arithmetic = self.arithmetic
        state = StateFolder(self.folder / "state", self.origin)
        begun = state.load()
        if self.end and begun is None:
            raise OutputError(
                "--end-recovery takes the best weights of a training, and none was begun with this recipe and this "
                "number of processes; leave the option out"
            )
        student = Student(open_decoder(self.repaired), self.settings, arithmetic=arithmetic)
        matching = None if self.end else self.matching
        beside = DenseBeside(matching, arithmetic=arithmetic, sharding=student.sharding) if matching else None
        training = Training(student, lessons, held_out, course, state, size, beside)
        progress = training.end(begun) if self.end and begun else training.run(begun)
        recovered = Recovered(progress, course, held_out.dense_perplexity(), ended=self.end)
        if not progress.best_step:
            return recovered
        writer = RecoveredWriter(self.repaired, self.folder, max_shard_size=self.max_shard_size)
        writer.write(student)
        return replace(recovered, folder=writer.folder, probe=probe_of(student, self.windows.held_out_NL[:1]))

    @torch.no_grad()
    def _measure_file(self, held_out: HeldOut, folder: Path | None) -> Measured:
        """Measure a checkpoint as it is stored; None: the repaired one."""
        source = self.repaired if folder is None else self.repaired.model_copy(update={"id": str(folder)})
        decoder = open_decoder(source)
        forward = LayerwiseForward(decoder, self.windows.held_out_NL, batch_size=1)
        for index in track(range(len(decoder)), "recovery: measuring the saved weights"):
            with decoder.layer(index) as layer:
                forward.pass_through(index, layer)
        return held_out.measure(lambda row: forward.logits(row)[0])
