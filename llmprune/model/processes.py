"""One process or several under torchrun: each walks its share of the windows, sums are added up.

torchrun starts the processes and says who is who; accelerate does the talking. One
process alone never sets anything up. ``accelerate launch --cpu --num_processes 2``
starts one process only: the report says how many there were.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmprune.errors import CalibrationError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # the others wait while the first evaluates


@lru_cache(maxsize=1)
def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether torchrun or accelerate's launcher started this process, however many there are."""
    return "WORLD_SIZE" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def local_device() -> torch.device:
    """The device that this process computes on where the device map leaves it open."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0)


def share_of(windows_NL: Tensor) -> Tensor:
    """This process's windows: every so many-th. Raises CalibrationError where some would get none."""
    require_windows_for_all(len(windows_NL))
    return windows_NL[rank() :: count()]


def require_windows_for_all(samples: int) -> None:
    """Raise CalibrationError where so few windows leave a process without any."""
    if samples < count():
        raise CalibrationError(
            f"{samples} calibration samples cannot be shared by {count()} processes; "
            "raise calibration.samples or start fewer processes"
        )


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add each tensor up over the processes, in place."""
    if count() == 1:
        return
    from accelerate.utils import reduce

    for tensor in tensors:
        tensor.copy_(reduce(tensor.to(_state().device), reduction="sum"))


def from_first(value: T) -> T:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    shared: list[T] = broadcast_object_list([value])
    return shared[0]


def talker() -> Any:
    """accelerate's own object for these processes, for libraries that speak through it."""
    from accelerate import Accelerator

    _state()
    return Accelerator(cpu=not torch.cuda.is_available())


def all_agree(yes: bool) -> bool:
    """Whether every process says yes. Also waits for all of them."""
    if count() == 1:
        return yes
    votes = torch.tensor([1.0 if yes else 0.0])
    sum_over_processes([votes])
    return int(votes) == count()


def leave() -> None:
    """Say goodbye to the others, at the very end."""
    if count() > 1:
        _state().destroy_process_group()
