"""Errors of GPUs, in a sentence that names the device, the cause and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmprune.common.errors import DeviceError, to_continue

_AMOUNT = r"([\d.]+ [KMGT]?i?B(?:ytes)?|\d+ bytes)"
# Parts of a CUDA error's text, and what it means with its remedy. Source: the CUDA runtime's error names.
_MEANINGS = {
    "no kernel image": "this torch has no kernels for it; install a build of torch for this GPU, or compute on the CPU "
    "with CUDA_VISIBLE_DEVICES=",
    "device-side assert": "an index is outside its tensor, such as a token id beyond the vocabulary; check that "
    "tokenizer and tokens belong to the model, and run with CUDA_LAUNCH_BLOCKING=1 to see the operation",
    "busy or unavailable": "another process uses it alone; wait for that, or choose other GPUs with devices",
    "invalid device ordinal": "there is no such device; check devices, model.device_map and CUDA_VISIBLE_DEVICES",
    "driver version is insufficient": "the driver is too old for this torch; update the driver, or install a build of "
    "torch for it",
    "driver on your system is too old": "update the driver, or install a build of torch for it",
    "uncorrectable ecc": "its memory is damaged; take it out of use, and {again}",
    "illegal memory access": "the GPU or a kernel is faulty; {again}, and if it fails there again, update driver and "
    "torch",
    "launch failure": "the GPU or a kernel is faulty; look at the system's log (dmesg), and {again}",
    "out of memory": "its memory is full; end other processes on it, or choose other GPUs with devices",
    "alloc_failed": "its memory is full; end other processes on it, or lower calibration.batch_size",
    "nccl": "the processes could not communicate; run with NCCL_DEBUG=INFO to see why, or with devices: 1",
}


_LESS_AT_ONCE = (
    "lower the batch_size or the length of the text of this step, or choose GPUs with more memory with devices"
)


@contextmanager
def device_errors(remedy: str = _LESS_AT_ONCE) -> Iterator[None]:
    """Raise DeviceError in place of a GPU's error that the block raises. ``remedy``: for full memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(explain_full_memory(str(error), remedy)) from error
    except RuntimeError as error:
        if re.search(r"\bCUDA error\b|\bHIP error\b|\bNCCL\b|NVIDIA driver", str(error)) is None:
            raise
        raise DeviceError(_explain(str(error))) from error


def explain_full_memory(message: str, remedy: str) -> str:
    """Return a sentence for torch's message of a full device: the device, what was needed and free, and who has it.

    ``remedy``: what to do where no other process is to be ended.
    """
    device = re.search(r"\b(?:GPU |cuda:|device )(\d+)", message)
    wanted = re.search(rf"[Tt]ried to allocate {_AMOUNT}", message)
    there = re.search(rf"total capacity of {_AMOUNT} of which {_AMOUNT} is free", message)
    own = re.search(rf"this process has {_AMOUNT}", message)
    others = re.findall(rf"(?<!this )[Pp]rocess (\d+) has {_AMOUNT}", message)
    parts = [f"GPU {device[1]} is out of memory" if device else "a GPU is out of memory"]
    if wanted:
        parts.append(f"{wanted[1]} more were needed" + (f", and {there[2]} of {there[1]} are free" if there else ""))
    holders = [*([f"this process has {own[1]}"] if own else []), *(f"process {pid} has {size}" for pid, size in others)]
    if holders:
        parts.append(", ".join(holders))
    if others:
        remedy = f"end the other processes on this GPU, or choose other GPUs with devices; else {remedy}"
    return f"{': '.join(parts[:2])}{f' ({parts[2]})' if parts[2:] else ''}; {remedy}, and {to_continue()}"


def _explain(message: str) -> str:
    """Return a sentence for an error of CUDA, its libraries or NCCL."""
    first = message.strip().splitlines()[0].rstrip(". ")
    lower = message.lower()
    meaning = next((meaning for part, meaning in _MEANINGS.items() if part in lower), "{again}")
    return f"the GPU reports: {first[:300]}; {meaning.format(again=to_continue())}"
