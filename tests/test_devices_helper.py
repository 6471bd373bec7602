"""The simulated devices of ``helpers.devices`` find each fault that they are made for, and let correct code pass."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.devices import CopyKind, SimulatedDevices, home_of, simulated_devices
from torch import Tensor

KIB = 1024


@pytest.fixture
def devices() -> Iterator[SimulatedDevices]:
    """Two devices."""
    with simulated_devices(2) as devices:
        yield devices


def _pinned(size: int = 8) -> Tensor:
    return torch.zeros(size, pin_memory=True)


def _on(device: int = 0, size: int = 8) -> Tensor:
    return torch.ones(size, device=f"cuda:{device}")


@pytest.mark.parametrize(
    "mix",
    [
        lambda: _on(0) + _on(1),
        lambda: _on(0) + torch.ones(8),
        lambda: torch.ones(8).add_(_on(0)),
        lambda: torch.cat([_on(0), torch.ones(8)]),
        lambda: _on(0)[torch.tensor([0], device="cuda:1")],
        lambda: torch.rand(3, generator=torch.Generator(), device="cuda:0"),
        lambda: _on(0).pin_memory(),
        lambda: _on(7),
    ],
)
@pytest.mark.usefixtures("devices")
def test_mixed_devices_are_refused(mix: Callable[[], Tensor]) -> None:
    """As CUDA refuses them."""
    with pytest.raises(RuntimeError, match=r"simulated"):
        mix()


@pytest.mark.usefixtures("devices")
def test_scalars_and_indices_of_the_cpu_are_taken() -> None:
    """A tensor without dimensions and an index on the CPU mix with a device, as on CUDA."""
    assert home_of(_on(1) * torch.tensor(2.0)) == torch.device("cuda:1")
    assert _on(0)[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_on, 1).result().device == torch.device("cuda:1")


def test_a_device_has_a_limit_of_memory() -> None:
    """What is live counts, views do not; each device has its own size."""
    with simulated_devices(2, memory=[4 * KIB, 8 * KIB]) as devices:
        kept = _on(0, 512)
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate .* GPU 0"):
            kept = torch.stack([_on(0, 512), kept])
        assert devices.used["cuda:0"] == 2 * KIB
        assert [kept.view(2, 256).data_ptr() for _ in range(9)]
        _on(1, 2048)
        del kept
        gc.collect()
        _on(0, 1024)
        assert devices.peak == {"cuda:0": 4 * KIB, "cuda:1": 8 * KIB}
        assert torch.cuda.mem_get_info(1) == (8 * KIB, 8 * KIB)
        devices.memory[0] = KIB  # another process fills it
        with pytest.raises(torch.OutOfMemoryError):
            _on(0, 512)


@pytest.mark.parametrize(
    "wait",
    [
        lambda value: value[0].item(),
        lambda value: value.tolist(),
        lambda value: bool(value.any()),
        lambda value: int(value[0]),
        lambda value: value.cpu(),
        lambda value: value.to("cpu"),
        lambda value: value.to("cpu", torch.float64, non_blocking=True),  # the conversion is the CPU's
        lambda value: torch.zeros(8).copy_(value, non_blocking=True),  # pageable
        lambda value: _pinned().copy_(value),
        lambda value: value.nonzero(),
        lambda value: torch.where(value > 0),
        lambda value: value[value > 0],
        lambda value: value.__setitem__(value > 0, value + 1),
        lambda value: torch.equal(value, value),
        lambda value: value.unique(),
        lambda value: torch.linalg.cholesky(value.diag()),
        lambda value: torch.cuda.synchronize(),
        lambda value: torch.cuda.current_stream().synchronize(),
        lambda value: torch.cuda.current_stream().record_event().synchronize(),
    ],
)
def test_waits_are_counted(wait: Callable[[Tensor], object], devices: SimulatedDevices) -> None:
    """Once, under the line that waits."""
    value = _on()
    before = devices.waits.total()
    wait(value)
    assert (before, devices.waits.total()) == (0, 1)
    assert all(line.startswith("test_devices_helper.py:") for line in devices.waits)


def test_work_that_the_host_does_not_wait_for(devices: SimulatedDevices) -> None:
    """Arithmetic, views, fills by a mask, kernels without a report and asynchronous copies are no waits."""
    value = _on(0, 16).view(4, 4)
    value[value > 0] = 2
    (value @ value.T).sum().sqrt_()
    torch.linalg.cholesky_ex(value + torch.eye(4, device="cuda:0"))
    value.to("cuda:1")
    value.to("cpu", non_blocking=True)
    value.copy_(_pinned(16).view(4, 4), non_blocking=True)
    assert not devices.waits


@pytest.mark.parametrize(
    ("copy", "kind"),
    [
        (lambda: _pinned().to("cuda:0", non_blocking=True), CopyKind.TO_DEVICE),
        (lambda: _pinned().to("cuda:0"), CopyKind.TO_DEVICE_BLOCKING),
        (lambda: torch.zeros(8).to("cuda:0", non_blocking=True), CopyKind.TO_DEVICE_PAGEABLE),
        (lambda: _pinned().to("cuda:0", torch.float16, non_blocking=True), CopyKind.TO_DEVICE_PAGEABLE),
        (lambda: _pinned(16)[::2].to("cuda:0", non_blocking=True), CopyKind.TO_DEVICE_PAGEABLE),
        (lambda: torch.tensor([1.0], device="cuda:0"), CopyKind.TO_DEVICE_PAGEABLE),
        (lambda: _on()[[0, 1]], CopyKind.TO_DEVICE_PAGEABLE),
        (lambda: _on().to("cpu", non_blocking=True), CopyKind.TO_HOST),
        (lambda: _pinned().copy_(_on(), non_blocking=True), CopyKind.TO_HOST),
        (lambda: _on().cpu(), CopyKind.TO_HOST_BLOCKING),
        (lambda: _on(1).to("cuda:0"), CopyKind.BETWEEN),
        (lambda: _on(1).copy_(_on(0)), CopyKind.BETWEEN),
    ],
)
def test_copies_are_counted_by_kind(copy: Callable[[], Tensor], kind: CopyKind, devices: SimulatedDevices) -> None:
    """Only a copy of dense pinned memory without a conversion does not block."""
    copy()
    assert [found for found, _ in devices.copies] == [kind]


def test_operations_in_float64_are_counted(devices: SimulatedDevices) -> None:
    """On devices and on tensors with dimensions."""
    torch.ones(3, dtype=torch.float64).sum()
    _on().sum(dtype=torch.float64)
    assert not devices.float64
    _on().double() + 1
    assert devices.float64.total() == 2


def test_a_device_without_float64() -> None:
    """It refuses the type, as Apple's GPUs do."""
    with simulated_devices(1, float64=False):
        assert _on().sum().item() == 8
        with pytest.raises(TypeError, match=r"doesn't support float64"):
            _on().sum(dtype=torch.float64)


def _use(ordered: bool) -> None:
    """Use on the default stream what is copied on another."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copied = _pinned().to("cuda:0", non_blocking=True)
    if ordered:
        torch.cuda.current_stream().wait_stream(stream)
        copied.record_stream(torch.cuda.current_stream())
    copied + 1


def _use_on_host(ordered: bool) -> None:
    """Read on the host what is copied to it."""
    copied = _on().to("cpu", non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    if ordered:
        event.synchronize()
    copied.sum().item()


def _copy_results(ordered: bool) -> None:
    """Copy from another stream what the default stream computes."""
    stream, value = torch.cuda.Stream(), _on()
    event = torch.cuda.Event()
    event.record()
    if ordered:
        stream.wait_event(event)
        value.record_stream(stream)
    with torch.cuda.stream(stream):
        value.to("cpu", non_blocking=True)


def _overwrite_on_host(ordered: bool) -> None:
    """Fill a pinned buffer again while it is copied."""
    buffer = _pinned()
    buffer.to("cuda:0", non_blocking=True)
    if ordered:
        torch.cuda.synchronize()
    buffer.copy_(torch.ones(8))


def _overwrite_on_device(ordered: bool) -> None:
    """Fill a buffer on the device again while another stream computes with it."""
    stream, buffer = torch.cuda.Stream(), _on()
    stream.wait_stream(torch.cuda.current_stream())
    buffer + 1
    if ordered:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        buffer.copy_(_pinned(), non_blocking=True)
    torch.cuda.synchronize()


def _free(ordered: bool) -> None:
    """Free a tensor that another stream still uses, and take its memory again."""
    stream = torch.cuda.Stream()
    with stream:
        copied = _pinned().to("cuda:0", non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    copied + 1
    if ordered:
        copied.record_stream(torch.cuda.current_stream())
    del copied
    with stream:
        _pinned().to("cuda:0", non_blocking=True)


def _between(ordered: bool) -> None:
    """A copy between devices follows both default streams, but no other one."""
    stream = torch.cuda.Stream("cuda:0")
    value = _on(0)
    with torch.cuda.stream(stream):
        if ordered:
            stream.wait_stream(torch.cuda.default_stream("cuda:0"))
        value.to("cuda:1") + 1
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "work", [_use, _use_on_host, _copy_results, _overwrite_on_host, _overwrite_on_device, _free, _between]
)
@pytest.mark.usefixtures("devices")
def test_streams_must_be_ordered(work: Callable[[bool], None]) -> None:
    """A use that no event, stream or wait orders after the last one raises and names the line; if ordered it passes."""
    work(True)
    with pytest.raises(RuntimeError, match=r"test_devices_helper\.py:\d+: .*simulated"):
        work(False)


@pytest.mark.usefixtures("devices")
def test_views_of_an_unfinished_copy_are_no_use() -> None:
    """Slices and shapes are asked for at once, as on CUDA; values are not."""
    copied = _on(0, 16).to("cpu", non_blocking=True)
    assert copied.view(4, 4)[1:].shape == (3, 4)
    with pytest.raises(RuntimeError, match=r"the host reads"):
        copied.view(4, 4)[1:].sum()
