"""One process or several under torchrun: each walks its share of the windows, sums are added up.

torchrun starts the processes and says who is who; accelerate does the talking. One
process alone never sets anything up. ``accelerate launch --cpu --num_processes 2``
starts one process only: the report says how many there were. Before they exchange
anything they make sure that all are there and do the same (``peers``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from llmprune.common.errors import CalibrationError, GateNotMet, LLMPruneError, PeerError, to_continue
from llmprune.common.hub.secrets import redact
from llmprune.common.peers import Peers
from llmprune.common.printing import printable

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)  # of torch's own exchanges: only those of lm-eval are not preceded by a meeting
_START = timedelta(minutes=5)  # in which all processes must have started
_STOPPED = "it was stopped"
_runs = 0  # that this process has taken part in: each has keys of its own
_peers: Peers | None = None


@lru_cache(maxsize=1)
def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_launcher() -> bool:
    """Whether torchrun or accelerate's launcher started this process, however many there are."""
    return "WORLD_SIZE" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def local_device() -> torch.device:
    """The device that this process computes on where the device map leaves it open."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0)


def windows_of_process(windows_NL: Tensor) -> Tensor:
    """This process's windows: every so many-th. Raises CalibrationError where some would get none."""
    require_windows_for_all(len(windows_NL))
    return windows_NL[rank() :: world_size()]


def require_windows_for_all(samples: int) -> None:
    """Raise CalibrationError where so few windows leave a process without any."""
    if samples < world_size():
        raise CalibrationError(
            f"{samples} calibration samples cannot be shared by {world_size()} processes; "
            "raise calibration.samples or start fewer processes"
        )


@contextmanager
def synchronized() -> Iterator[None]:
    """Run the block in step with the other processes: an error of one ends it in all, with a sentence.

    Raises PeerError where another process failed, died, or is about to do something else.
    """
    global _peers, _runs
    if world_size() == 1 or _peers is not None:
        yield
        return
    _runs += 1
    _peers = peers = _meet_peers(f"run {_runs}")
    try:
        peers.meet("start")
        yield
        peers.end()
    except GateNotMet:  # the same in all
        peers.end()
        raise
    except BaseException as error:
        failure = peers.failure
        gone = peers.fail(_sentence(error))
        if isinstance(error, KeyboardInterrupt) and gone and failure is None:  # a launcher stops all where one dies
            failure = (
                f"process {gone[0]} of {peers.count} is gone: it was killed, or its own output says why it ended; "
                f"{to_continue()}"
            )
        if failure is not None and not isinstance(error, PeerError) and not failure.endswith(_STOPPED):
            raise PeerError(failure) from error  # what broke here broke because of it
        raise
    finally:
        _peers = None


def _meet_peers(name: str) -> Peers:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    def connect() -> Store:
        store, _, _ = next(iter(rendezvous("env://", timeout=_START)))
        return PrefixStore(name, store)

    try:
        return Peers(connect, rank=rank(), count=world_size())
    except RuntimeError as error:
        raise PeerError(
            f"not all of the {world_size()} processes have started within {_START.total_seconds() / 60:.0f} minutes "
            f"({str(error).strip().splitlines()[0]}); look at the output of each, and start them again"
        ) from error


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return _STOPPED
    said = str(error) if isinstance(error, LLMPruneError) else f"{type(error).__name__}: {error}"
    return printable(redact(said))


def _meet(step: str, value: str = "") -> None:
    """Wait for the others at this step, which the caller's place in the code is part of."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    if _peers is not None:
        _peers.meet(f"{step} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})", value)


def require_agreement(what: str, value: str) -> None:
    """Raise PeerError unless every process has the same value of this."""
    _meet(what, value)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add each tensor up over the processes, in place."""
    if world_size() == 1:
        return
    from accelerate.utils import reduce

    parts = list(tensors)
    _meet(f"a sum of {len(parts)} tensors of shapes {', '.join(str(tuple(part.shape)) for part in parts)}")
    for tensor in parts:
        tensor.copy_(reduce(tensor.to(_state().device), reduction="sum"))


def broadcast_from_first(value: T) -> T:
    """The first process's value, in every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _meet("a value of the first process")
    _state()
    shared: list[T] = broadcast_object_list([value])
    return shared[0]


def shared_accelerator() -> Any:
    """accelerate's own object for these processes, for libraries that speak through it."""
    from accelerate import Accelerator

    _state()
    return Accelerator(cpu=not torch.cuda.is_available())


def all_agree(yes: bool) -> bool:
    """Whether every process says yes. Also waits for all of them."""
    if world_size() == 1:
        return yes
    votes = torch.tensor([1.0 if yes else 0.0])
    sum_over_processes([votes])
    return int(votes) == world_size()


def leave_process_group() -> None:
    """Say goodbye to the others, at the very end."""
    if world_size() > 1:
        _state().destroy_process_group()
