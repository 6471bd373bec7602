"""Data parallelism over processes: each process runs its share of the windows, and sums are reduced.

torchrun or accelerate's launcher starts the processes; accelerate sets up the process group, which a single process
does without. ``accelerate launch --cpu --num_processes 2`` starts one process only: the report states their number.
Before each exchange the processes check that all of them are alive and at the same step (``peers``).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from llmprune.common.device_errors import device_errors
from llmprune.common.errors import CalibrationError, DeviceError, LLMPruneError, PeerError, to_continue
from llmprune.common.hub.secrets import redact
from llmprune.common.peers import Peers
from llmprune.common.printing import printable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_COLLECTIVE_TIMEOUT = timedelta(hours=6)  # of torch's collectives; only those of lm-eval do not follow a rendezvous
_START_TIMEOUT = timedelta(minutes=5)  # until all processes must have started
_SUMMED_IN_PLACE = 2**22  # values from which a tensor is summed without a copy
_STOPPED = "it was stopped"
# Variables by which launchers number their processes, and let these find each other.
_NUMBERS = {f"{group}{of}" for group in ("", "LOCAL_", "GROUP_", "ROLE_") for of in ("RANK", "WORLD_SIZE")}
_OF_LAUNCHERS = _NUMBERS | {"MASTER_ADDR", "MASTER_PORT"}
_runs = 0  # of this process so far; each has its own keys in the store
_peers: Peers | None = None


@lru_cache(maxsize=1)
def _state() -> Any:
    from accelerate import PartialState

    try:
        return PartialState(cpu=not torch.cuda.is_available(), timeout=_COLLECTIVE_TIMEOUT)
    except NotImplementedError as error:  # accelerate refuses RTX 4000 cards whose driver lets NCCL try direct copies
        raise DeviceError(
            "with this driver these GPUs cannot exchange data directly, and NCCL would try it; update the driver, or "
            f"set NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1, and {to_continue()}"
        ) from error


def world_size() -> int:
    """Return the number of processes that share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_on_machine() -> int:
    """Return the number of processes on this machine that share the work, and so its main memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def has_launcher() -> bool:
    """Check whether torchrun or accelerate's launcher started this process, alone or with others."""
    return "WORLD_SIZE" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def environment_of_one() -> dict[str, str]:
    """Return this process's environment for a program that is none of several processes, whatever this one is."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }


def rank() -> int:
    """Return the index of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_first_process() -> bool:
    """Check whether this is the process that writes files and prints."""
    return rank() == 0


def local_device() -> torch.device:
    """Return the device of this process, for models whose device map does not name one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0)


def windows_of_process(windows_NL: Tensor) -> Tensor:
    """Return the windows of this process: every ``world_size``-th from ``rank`` on.

    Raises CalibrationError where a process would get none.
    """
    require_windows_for_all(len(windows_NL))
    return windows_NL[rank() :: world_size()]


def require_windows_for_all(samples: int) -> None:
    """Raise CalibrationError unless every process gets at least one of ``samples`` windows."""
    if samples < world_size():
        raise CalibrationError(
            f"{samples} calibration samples cannot be shared by {world_size()} processes; "
            "raise calibration.samples or start fewer processes"
        )


@contextmanager
def synchronized() -> Iterator[None]:
    """Run a block in all processes; an error of one process ends it in all of them, with a message.

    Raises PeerError where another process failed, died, or is at another step; DeviceError for an error of a GPU.
    """
    global _peers, _runs
    if world_size() == 1 or _peers is not None:
        with device_errors():
            yield
        return
    _runs += 1
    _peers = peers = _meet_peers(f"run {_runs}")
    try:
        peers.meet("start")
        with device_errors():
            yield
        peers.end()
    except BaseException as error:
        failure = peers.failure
        gone = peers.fail(_describe(error))
        if (
            isinstance(error, KeyboardInterrupt) and gone and failure is None
        ):  # a launcher stops all processes where one dies
            failure = (
                f"process {gone[0]} of {peers.count} is gone: it was killed, or its own output says why it ended; "
                f"{to_continue()}"
            )
        same = failure is not None and failure.endswith((_STOPPED, _describe(error)))  # each process explains it itself
        if failure is not None and not isinstance(error, PeerError) and not same:
            raise PeerError(failure) from error  # the error here is a consequence of that failure
        raise
    finally:
        _peers = None


def _meet_peers(name: str) -> Peers:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    def connect() -> Store:
        store, _, _ = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
        return PrefixStore(name, store)

    try:
        return Peers(connect, rank=rank(), count=world_size())
    except RuntimeError as error:
        minutes = _START_TIMEOUT.total_seconds() / 60
        raise PeerError(
            f"not all of the {world_size()} processes have started within {minutes:.0f} minutes "
            f"({str(error).strip().splitlines()[0]}); look at the output of each, and start them again"
        ) from error


def _describe(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return _STOPPED
    message = str(error) if isinstance(error, LLMPruneError) else f"{type(error).__name__}: {error}"
    return printable(redact(message))


def _meet(step: str, value: str = "") -> None:
    """Wait until all processes are at this step, which includes the caller's file and line."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    if _peers is not None:
        _peers.meet(f"{step} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})", value)


def require_agreement(what: str, value: str) -> None:
    """Raise PeerError unless every process has the same value of ``what``."""
    _meet(what, value)


def meet_at_end(step: str) -> None:
    """Wait until every process has completed a step. Raises PeerOutOfMemoryError where one ran out of memory in it."""
    _meet(f"the end of {step}")


def report_out_of_memory(message: str) -> dict[int, str]:
    """Tell the other processes that this one ran out of memory; return the messages of all that did, by process.

    The others get PeerOutOfMemoryError at their next exchange. Afterwards all processes are at the same step.
    """
    return {rank(): message} if _peers is None else _peers.report_shortage(message)


def least_over_processes(number: int) -> int:
    """Return the least of the numbers of all processes."""
    if world_size() == 1:
        return number
    numbers_P = torch.zeros(world_size(), dtype=torch.int64)
    numbers_P[rank()] = number
    sum_over_processes([numbers_P])
    return int(numbers_P.min())


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the processes, in place: in one exchange, of one buffer for each type of number.

    Large contiguous tensors on the device of the exchange are summed where they are, which takes no memory.
    """
    parts = list(tensors)
    if world_size() == 1 or not parts:
        return
    shapes = Counter(tuple(part.shape) for part in parts)
    device, small = _exchange_device(), dict[torch.dtype, list[Tensor]]()
    large = []
    for part in parts:
        if part.numel() >= _SUMMED_IN_PLACE and part.is_contiguous() and part.device == device:
            large.append(part)
        else:
            small.setdefault(part.dtype, []).append(part)
    # allocated before the processes meet: one that runs out of memory later would leave the others in the sum
    flats = [torch.cat([part.reshape(-1).to(device) for part in own]) for own in small.values()]
    _meet(f"a sum of {', '.join(f'{count} tensors of shape {shape}' for shape, count in shapes.items())}")
    for summed in (*large, *flats):
        torch.distributed.all_reduce(summed)
    for own, flat in zip(small.values(), flats, strict=True):
        for part, total in zip(own, torch.split(flat, [part.numel() for part in own]), strict=True):
            part.copy_(total.view(part.shape))


def _exchange_device() -> torch.device:
    """Return the device that the process group exchanges tensors of; accelerate numbers the CPU too."""
    device: torch.device = _state().device
    return torch.device("cpu") if device.type == "cpu" else device


def broadcast_from_first(value: T) -> T:
    """Return the first process's value in every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _meet("a value of the first process")
    _state()
    shared: list[T] = broadcast_object_list([value])
    return shared[0]


def mesh_of_processes() -> DeviceMesh:
    """Return the mesh of all processes, in one dimension, for libraries that shard a model over them.

    Their exchanges follow no rendezvous: the processes must come to each in the same order.
    """
    from torch.distributed.device_mesh import init_device_mesh

    _state()
    return init_device_mesh(local_device().type, (world_size(),))


def shared_accelerator() -> Any:
    """Return accelerate's Accelerator for these processes, for libraries that communicate through it."""
    from accelerate import Accelerator

    _state()
    return Accelerator(cpu=not torch.cuda.is_available())


def all_agree(yes: bool) -> bool:
    """Check whether ``yes`` is true in every process. Waits for all of them."""
    if world_size() == 1:
        return yes
    votes = torch.tensor([1.0 if yes else 0.0])
    sum_over_processes([votes])
    return int(votes) == world_size()


def leave_process_group() -> None:
    """Leave the process group, at the very end of the program."""
    if world_size() > 1:
        _state().destroy_process_group()
