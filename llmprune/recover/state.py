"""State of a training on disk: what a killed run needs to go on as if it had not been killed.

``progress.json`` names the step whose weights and optimiser state are valid. Each process writes its own part of both.
The best weights so far lie beside them. A file is complete or absent, and older ones are deleted only when the newer
ones are named.

Shapes: X any.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmprune.common.distributed import broadcast_from_first, is_first_process, meet_at_end, rank, world_size
from llmprune.common.files import disk_errors, write_atomically, write_text
from llmprune.recover.sharding import local
from llmprune.recover.student import Student
from llmprune.results.figures.base import Figures
from llmprune.results.figures.recovery import RecoveryCheck

logger = logging.getLogger(__name__)

_WEIGHT = "weight:"  # before the names of weights; others are of the optimiser


class Progress(Figures):
    """Progress of a training.

    ``scale``: factor of the learning rate; ``smoothed``, ``lowest``: moving mean of the training loss and its least
    value, None before the first step; ``losses``: of the steps since the last check.
    """

    step: int = 0
    scale: float = 1.0
    setbacks: int = 0
    best_step: int = 0
    smoothed: float | None = None
    lowest: float | None = None
    losses: tuple[float, ...] = ()
    checks: tuple[RecoveryCheck, ...] = ()
    seconds: float = 0.0


class StateFolder:
    """Folder of the state of one training. ``origin``: fingerprint of what the training depends on.

    Another number of processes, which divide the weights and the windows differently, begins again.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path / f"{origin[:16]}-{world_size()}"
        self._progress = self.path / "progress.json"

    def load(self) -> Progress | None:
        """Return the progress of an earlier run; None where there is none that can be read. All processes agree."""
        found = broadcast_from_first(self._read() if is_first_process() else None)
        other = next(self.path.parent.glob(f"{self.path.name.partition('-')[0]}-*/progress.json"), None)
        if found is None and other is not None and is_first_process():
            logger.warning(
                "recovery: the training was begun by %s processes; by %d it begins again",
                other.parent.name.rpartition("-")[2],
                world_size(),
            )
        return found

    def _read(self) -> Progress | None:
        try:
            progress = Progress.model_validate_json(self._progress.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None
        return progress if self._state(progress.step).is_dir() else None

    def save(self, progress: Progress, student: Student) -> None:
        """Save weights and optimiser after a step, and the weights once more where they are the best so far."""
        weights = {f"{_WEIGHT}{name}": local(one.detach()) for name, one in student.trained.items()}
        state = {
            f"{key}:{name}": local(value)
            for name, one in student.trained.items()
            for key, value in student.optimizer.state.get(one, {}).items()
        }
        self._write(self._state(progress.step), weights | state)
        if progress.best_step == progress.step > 0:
            self._write(self._best(progress.step), weights)
        meet_at_end("the state of the training")
        self.record(progress)
        if is_first_process():
            kept = {self._state(progress.step), self._best(progress.best_step)}
            for folder in [*self.path.glob("state-*"), *self.path.glob("best-*")]:
                if folder not in kept:
                    shutil.rmtree(folder)

    def record(self, progress: Progress) -> None:
        """Write the progress alone, where weights and optimiser are those on disk."""
        if is_first_process():
            write_text(self._progress, progress.model_dump_json(indent=1) + "\n")

    def restore(self, progress: Progress, student: Student) -> None:
        """Load weights and optimiser state of the progress's step."""
        tensors = load_file(self._state(progress.step) / _part())
        _load_weights(student, tensors)
        student.optimizer.state.clear()
        for name, parameter in student.trained.items():
            values = {
                key.partition(":")[0]: tensor
                for key, tensor in tensors.items()
                if key.partition(":")[2] == name and not key.startswith(_WEIGHT)
            }
            if values:
                student.optimizer.state[parameter] = {key: _like(parameter, tensor) for key, tensor in values.items()}

    def restore_best(self, progress: Progress, student: Student) -> None:
        """Load the best weights."""
        _load_weights(student, load_file(self._best(progress.best_step) / _part()))

    def _state(self, step: int) -> Path:
        return self.path / f"state-{step}"

    def _best(self, step: int) -> Path:
        return self.path / f"best-{step}"

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_atomically(folder / _part(), lambda path: save_file(contents, path))


def _part() -> str:
    return f"part-{rank():05}.safetensors"


def _load_weights(student: Student, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in student.trained.items():
            local(parameter).copy_(tensors[f"{_WEIGHT}{name}"])


def _like(parameter: Tensor, value_X: Tensor) -> Tensor:
    """Return a value of the optimiser's state as the optimiser holds it: sharded like its parameter, counts whole."""
    value_X = value_X.to(local(parameter).device, copy=True)
    if value_X.ndim == 0 or not isinstance(parameter, DTensor):
        return value_X
    sharded: Tensor = DTensor.from_local(
        value_X, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return sharded
