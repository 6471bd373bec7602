"""Train a model: optimiser steps, measurements on held-out windows, and the way back from a divergence.

The weights that are best on the held-out windows are kept. Where the loss explodes or is NaN, the training goes back to
its last good state with half the learning rate.

Shapes: B batch, L sequence length, V vocabulary, T tokens, W windows of a step.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.common.distributed import sum_over_processes, world_size
from llmprune.common.errors import TrainingStopped
from llmprune.common.progress import track
from llmprune.recover.beside import DenseBeside
from llmprune.recover.course import Course
from llmprune.recover.held_out import HeldOut, Measured
from llmprune.recover.interrupts import Interrupts
from llmprune.recover.lessons import Lessons
from llmprune.recover.state import Progress, StateFolder
from llmprune.recover.student import Student
from llmprune.results.figures.recovery import RecoveryCheck

logger = logging.getLogger(__name__)

TRAINING = "recovery: training"  # in progress and in the durations of a plan
LARGEST_NORM = 1.0  # of the gradients of a step
MOST_SETBACKS = 5
_MEMORY = 0.9  # of the moving mean of the loss


@dataclass
class Training:
    """One training of a student. ``micro_batch``: windows whose activations are in memory together.

    ``beside``: the dense model whose hidden states the student's are trained towards.
    """

    student: Student
    lessons: Lessons
    held_out: HeldOut
    course: Course
    state: StateFolder
    micro_batch: int
    beside: DenseBeside | None = None
    progress: Progress = field(default_factory=Progress)

    def run(self, found: Progress | None) -> Progress:
        """Train to the end, from the state ``found`` of an earlier run; the student then has the best weights.

        Raises TrainingStopped, with the state saved, after the step in which Ctrl-C was pressed.
        """
        if found is None:
            self._check()
        else:
            self.progress = found
            self.state.restore(found, self.student)
        with Interrupts() as interrupts:
            while self.progress.step < self.course.steps and self.progress.setbacks <= MOST_SETBACKS:
                self._train(interrupts)
        return self._with_best()

    def end(self, found: Progress) -> Progress:
        """Make no more steps after those of an earlier run; the student then has the best weights so far."""
        self.progress = found
        return self._with_best()

    def _with_best(self) -> Progress:
        if self.progress.best_step:
            self.state.restore_best(self.progress, self.student)
        return self.progress

    def _train(self, interrupts: Interrupts) -> None:
        """Make steps until the end or the next setback."""
        for step in track(range(self.progress.step, self.course.steps), TRAINING, detail=self._detail):
            begin = time.perf_counter()
            loss, stopped = self._step(step, interrupts)
            self._note(loss, seconds=time.perf_counter() - begin)
            if self._has_exploded() or (self.course.is_check(step + 1) and not self._check()):
                return self._go_back()
            if stopped:
                self.state.save(self.progress, self.student)
                raise TrainingStopped(self.progress.step, self.course.steps, best=self.progress.best_step)
        return None

    def _step(self, step: int, interrupts: Interrupts) -> tuple[float, bool]:
        """Make one optimiser step; return its loss in nats per token, over the windows of all processes.

        The second value: whether any process was told to stop, so that all stop after the same step.
        """
        self.student.optimizer.zero_grad(set_to_none=True)
        rows_W = self.lessons.order_SW[step]
        loss = torch.zeros(1, device=self.student.arithmetic.device)
        for rows_B in torch.split(rows_W, self.micro_batch):
            loss += self._backward(rows_B, share=len(rows_B) / len(rows_W))
        norm = self.student.clip_gradients(LARGEST_NORM)
        told = torch.tensor([float(interrupts.arrived)])
        sum_over_processes([loss, told])
        stopped, value = bool(told), float(loss) / world_size()
        if math.isfinite(value) and math.isfinite(norm):
            self.student.optimizer.param_groups[0]["lr"] = self.course.rate_of(step) * self.progress.scale
            self.student.optimizer.step()
            return value, stopped
        return math.nan, stopped

    def _backward(self, rows_B: Tensor, *, share: float) -> Tensor:
        """Add the gradients of some windows, which are this share of a step; return their share of its loss."""
        ids_BL = self.lessons.windows_NL[rows_B]
        nothing: AbstractContextManager[list[Tensor]] = nullcontext([])
        with self.beside.compared(self.student.layers, ids_BL) if self.beside else nothing as errors:
            logits_BLV = self.student.logits(ids_BL)
        loss = self.lessons.mean_loss(logits_BLV, rows_B) * share
        whole = loss + self.beside.loss(errors) * share if self.beside else loss
        whole.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _detail(self) -> str:
        """Return how the training stands, in words."""
        now, checks = self.progress, self.progress.checks
        tokens = now.step * self._tokens_of_step
        loss = f", loss {now.smoothed:.3f}" if now.smoothed is not None else ""
        divergence = f", held-out divergence {checks[-1].mean_divergence:.3f}"
        first = f" ({checks[0].mean_divergence:.3f} at first)" if len(checks) > 1 else ""
        return f"{tokens:,} tokens{loss}{divergence}{first}"

    @property
    def _tokens_of_step(self) -> int:
        return self.course.order_SW.shape[1] * self.lessons.windows_NL.shape[1]

    def _note(self, loss: float, *, seconds: float) -> None:
        """Record a step."""
        now = self.progress
        smoothed = loss if now.smoothed is None else _MEMORY * now.smoothed + (1 - _MEMORY) * loss
        self.progress = now.model_copy(
            update={
                "step": now.step + 1,
                "smoothed": smoothed,
                "lowest": smoothed if now.lowest is None else min(now.lowest, smoothed),
                "losses": (*now.losses, loss),
                "seconds": now.seconds + seconds,
            }
        )

    def _has_exploded(self) -> bool:
        smoothed, lowest = self.progress.smoothed, self.progress.lowest
        return smoothed is not None and lowest is not None and not smoothed <= 1.5 * lowest + 0.2  # NaN too

    def _check(self) -> bool:
        """Measure the held-out windows and save the state; False, with nothing saved, where the model is broken."""
        windows_NL = self.held_out.predictions.windows_NL
        measured = self.held_out.measure(lambda row: self.student.logits(windows_NL[row, None])[0])
        checks = self.progress.checks
        if checks and not measured.mean <= 1.5 * checks[0].mean_divergence + 0.2:
            return False
        best = min((check.mean_divergence for check in checks), default=math.inf)
        check = self._as_check(measured, kept=measured.mean < best)
        best_step = check.step if check.kept else self.progress.best_step
        self.progress = self.progress.model_copy(
            update={"checks": (*checks, check), "losses": (), "best_step": best_step}
        )
        self.state.save(self.progress, self.student)
        logger.info(
            "recovery: step %d of %d, %s tokens, held-out divergence %.4f (%.4f at the beginning)",
            check.step,
            self.course.steps,
            f"{check.tokens:,}",
            measured.mean,
            self.progress.checks[0].mean_divergence,
        )
        return True

    def _as_check(self, measured: Measured, *, kept: bool) -> RecoveryCheck:
        losses, step = self.progress.losses, self.progress.step
        return RecoveryCheck(
            step=step,
            tokens=step * self._tokens_of_step,
            loss=sum(losses) / len(losses) if losses else None,
            divergence=measured.divergence,
            perplexity=measured.perplexity,
            kept=kept,
        )

    def _go_back(self) -> None:
        """Return to the last good state, with half the learning rate."""
        good = self.state.load()
        assert good is not None, "a state was saved before the first step"
        scale, setbacks = good.scale / 2, good.setbacks + 1
        self.progress = good.model_copy(update={"scale": scale, "setbacks": setbacks})
        self.state.record(self.progress)
        self.state.restore(self.progress, self.student)
        logger.warning(
            "recovery: the loss exploded; the training goes back to step %d with %g times the learning rate",
            self.progress.step,
            scale,
        )
