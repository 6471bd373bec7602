"""Retries of a step with half the batch, where a device runs out of memory.

All processes of a run retry together. A process that runs out publishes that in place of its next exchange, where the
others wait for it or arrive later (``Peers.report_shortage``); they leave the step there, and all begin it again.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from llmprune.common.device_errors import explain_full_memory
from llmprune.common.distributed import meet_at_end, rank, report_out_of_memory, world_size
from llmprune.common.errors import DeviceMemoryError
from llmprune.common.peers import PeerOutOfMemoryError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GPU = re.compile(r"\bGPU (\d+)\b")
# Libraries that allocate without torch's allocator report that as RuntimeError.
_FAILED_ALLOCATIONS = re.compile(
    r"(CU|HIP|ROC)(BLAS|SOLVER|SPARSE|DNN)_STATUS_ALLOC_FAILED|(CUDA|HIP) error: out of memory", re.IGNORECASE
)


class BatchSize:
    """Number of windows (``unit``) that are processed at a time, halved where a device runs out of memory.

    ``alone``: this process works by itself, and the others are not told. ``reductions``: a sentence for each time that
    it was halved, for the report. ``on_reduction`` is called then.
    """

    def __init__(
        self, number: int, unit: str = "windows", *, alone: bool = False, reductions: list[str] | None = None
    ) -> None:
        self.number, self.unit, self.alone = number, unit, alone
        self.reductions: list[str] = [] if reductions is None else reductions
        self.on_reduction: Callable[[], None] | None = None

    def of_part(self) -> BatchSize:
        """Return the batch size of a part of a step, which is halved without that of the step; both report together."""
        part = BatchSize(self.number, self.unit, alone=self.alone, reductions=self.reductions)
        part.on_reduction = self.on_reduction
        return part

    def run(self, step: str, work: Callable[[int], T], *, release: Callable[[], None] = lambda: None) -> T:
        """Return ``work(number)``; where a device runs out of memory, release and try again with half the number.

        Unless it works alone, every process of the run calls this at the same place, and all have completed the step
        when it returns. ``release`` drops what earlier steps left in memory, and makes the next attempt need less.
        Raises DeviceMemoryError where a single window does not fit even then, in every process.
        """
        released = self.alone
        while True:
            try:
                done = work(self.number)
                if not self.alone:
                    meet_at_end(step)
                return done
            except PeerOutOfMemoryError as error:
                messages = error.messages
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                own = describe_shortage(error)
                messages = {rank(): own} if self.alone else report_out_of_memory(own)
            # here the traceback, which holds the tensors of the failed attempt, is gone
            release()
            free_cached_memory()
            if self.number == 1 and released:
                raise self._too_large(step, messages)
            released = True
            self._halve(step, messages)

    def _halve(self, step: str, messages: dict[int, str]) -> None:
        before, self.number = self.number, max(self.number // 2, 1)
        how = f"with {self.number}" if before > 1 else "with no layer kept there, nor copied ahead"
        sentence = (
            f"{step} ran out of memory on {_places(messages)} with batches of {before} {self.unit}; it was repeated "
            f"{how}"
        )
        if sentence not in self.reductions:  # a continued run has it from the stopped one
            self.reductions.append(sentence)
        logger.warning("%s", sentence)
        if self.on_reduction is not None:
            self.on_reduction()

    def _too_large(self, step: str, messages: dict[int, str]) -> DeviceMemoryError:
        """Return the error for a device that a single window fills, with the cause in the first process concerned."""
        one = self.unit.removesuffix("s")
        first = "give less memory to the weights with model.max_memory"
        first = first if self.alone else f"shorten each {one} with sequence_length"
        cause = explain_full_memory(
            messages[min(messages)].partition("\n")[2], f"{first}, or choose GPUs with more memory with devices"
        )
        return DeviceMemoryError(f"{step}, a single {one} at a time, on {_places(messages)}: {cause}")


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error says that a device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_FAILED_ALLOCATIONS.search(str(error)))


def describe_shortage(error: BaseException) -> str:
    """Return the device that is full and the error's text: ``cuda:0``, a line break, the text in one line."""
    found = _GPU.search(str(error))
    return f"cuda:{found[1] if found else _current_device()}\n{' '.join(str(error).split())}"


def free_cached_memory() -> None:
    """Give memory that nothing uses any more back to the devices, and pinned memory to the host."""
    gc.collect()  # exceptions and the frames that they name may form cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # torch 2.11 has none
        if empty_host_cache is not None:
            empty_host_cache()


def _current_device() -> int:
    return int(torch.cuda.current_device()) if torch.cuda.is_available() else 0


def _places(messages: dict[int, str]) -> str:
    """Return the devices that are full, with the process of each where there are several."""
    named = {process: message.partition("\n")[0] for process, message in sorted(messages.items())}
    if world_size() == 1:
        return named[rank()]
    return ", ".join(f"{device} of process {process}" for process, device in named.items())
