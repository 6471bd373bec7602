"""Errors of GPUs as people read them."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch

from llmprune.common import distributed
from llmprune.common.device_errors import device_errors
from llmprune.common.distributed import synchronized
from llmprune.common.errors import DeviceError
from llmprune.common.out_of_memory import BatchSize, is_out_of_memory

FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.15 GiB of which 1.19 GiB is free."
    " Process 4711 has 70.20 GiB memory in use. Including non-PyTorch memory, this process has 7.75 GiB memory in use. "
    "Of the allocated memory 7.01 GiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
)


def _said(error: Exception) -> str:
    with pytest.raises(DeviceError) as found, device_errors():
        raise error
    assert found.value.__cause__ is error
    return str(found.value)


def test_a_full_gpu_is_explained() -> None:
    """The sentence has the GPU, what was needed and free, who holds the rest, and what to do."""
    said = _said(torch.OutOfMemoryError(FULL))
    assert said.startswith(
        "GPU 1 is out of memory: 2.50 GiB more were needed, and 1.19 GiB of 79.15 GiB are free (this process has "
        "7.75 GiB, process 4711 has 70.20 GiB); end the other processes on this GPU, or choose other GPUs with devices"
    )
    assert said.endswith("and run the same command again to continue")
    alone = _said(torch.OutOfMemoryError(FULL.replace("Process 4711 has 70.20 GiB memory in use. ", "")))
    assert "; lower the batch_size or the length of the text of this step" in alone
    assert _said(torch.OutOfMemoryError("simulated")).startswith("a GPU is out of memory; lower")


@pytest.mark.parametrize(
    ("reported", "remedy"),
    [
        (
            "CUDA error: no kernel image is available for execution on the device",
            "install a build of torch for this GPU",
        ),
        ("CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING=1"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "choose other GPUs with devices"),
        ("CUDA error: unspecified launch failure", "dmesg"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "lower calibration.batch_size"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "update the driver"),
        ("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited", "NCCL_DEBUG=INFO"),
        ("CUDA error: something new", "run the same command again to continue"),
    ],
)
def test_errors_of_cuda_have_a_remedy(reported: str, remedy: str) -> None:
    """The first line of what the GPU reports stays, without its advice for programmers, and a remedy follows."""
    said = _said(RuntimeError(f"{reported}\nCUDA kernel errors might be asynchronously reported"))
    assert said.startswith(f"the GPU reports: {reported.rstrip('.')}; ")
    assert remedy in said
    assert "\n" not in said


def test_gpus_that_cannot_copy_directly_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate refuses RTX 4000 cards with an old driver; a launcher's environment makes them work."""

    def refuse(**_: Any) -> None:
        raise NotImplementedError("Using RTX 4000 series doesn't support faster communication broadband via P2P or IB.")

    monkeypatch.setattr(accelerate, "PartialState", refuse)
    distributed._state.cache_clear()
    with pytest.raises(DeviceError, match="set NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1"):
        distributed.shared_accelerator()


def test_a_run_explains_them() -> None:
    """The block that all commands and the Python API work in raises the explained error."""
    with pytest.raises(DeviceError, match="GPU 1 is out of memory"), synchronized():
        raise torch.OutOfMemoryError(FULL)


def test_other_errors_pass() -> None:
    """An error that no GPU reports keeps its class."""
    with pytest.raises(RuntimeError, match="shape") as found, device_errors():
        raise RuntimeError("shape mismatch")
    assert not isinstance(found.value, DeviceError)


@pytest.mark.parametrize(
    ("reported", "full"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: hipblasStatus: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", True),
        ("HIP error: out of memory", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: unspecified launch failure", False),
    ],
)
def test_libraries_report_full_memory_in_their_own_words(reported: str, full: bool) -> None:
    """A step is tried again with smaller batches for errors of libraries that allocate without torch, ROCm's too."""
    assert is_out_of_memory(RuntimeError(reported)) == full


def test_a_single_window_is_tried_again_after_a_release() -> None:
    """It needs less once nothing else is on the device; where it does not fit even then, the error says so."""
    events: list[str] = []

    def work(number: int) -> int:
        events.append(f"window {number}")
        if len(events) < 2:
            raise torch.OutOfMemoryError(FULL)
        return number

    batch = BatchSize(1)
    assert batch.run("pass 1", work, release=lambda: events.append("released")) == 1
    assert events == ["window 1", "released", "window 1"]
    assert batch.reductions == [
        "pass 1 ran out of memory on cuda:1 with batches of 1 windows; it was repeated with no layer kept there, nor "
        "copied ahead"
    ]

    def full(_: int) -> None:
        raise torch.OutOfMemoryError(FULL)

    with pytest.raises(DeviceError, match="pass 1, a single window at a time, on cuda:1: GPU 1 is out of memory"):
        batch.run("pass 1", full)
