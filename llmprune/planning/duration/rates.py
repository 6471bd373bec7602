"""Rates of a device: how fast it multiplies, reads and copies, measured once in half a second and kept.

They are those of a machine that does nothing else.

The products are measured on the path that the layers take: types that the CPU emulates go through float32
(``layerwise.emulated_matmul``).
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import ValidationError
from torch.nn.functional import linear

from llmprune.common.devices import device_name
from llmprune.common.errors import DiskError
from llmprune.common.files import write_text
from llmprune.layerwise.emulated_matmul import is_emulated, quick_products
from llmprune.results.figures.base import Figures

_SMALLEST, _LARGEST = 256, 2048  # rows and columns of the matrix that is multiplied with
_LEAST_TOKENS, _MOST_TOKENS = 64, 8192
_FEW_TOKENS = 8  # of a narrow product
_LONG_ENOUGH = 0.02  # seconds of one measurement
_REPEATS = 3
_STREAM_BYTES, _FILE_BYTES = 2**26, 2**23
_MOST_KEPT = 100  # devices in the file


class Rates(Figures):
    """Rates of one device for one type of numbers."""

    products: float  # operations a second of matrix products in the type that the layers compute in
    plain_products: float  # the same, computed by transformers' own model
    sums: float  # operations a second of float32 products
    stream: float  # bytes a second that an elementwise operation reads and writes
    narrow: float  # bytes of weights a second that a product with a few tokens reads, besides its operations
    copies: float  # bytes a second from the CPU's memory to the device; on a CPU as ``stream``
    files: float  # bytes a second that are written to a file
    call: float  # seconds to start one operation


def known_rates(device: torch.device, dtype: torch.dtype, *, hidden: int) -> Rates | None:
    """Return the kept rates of a device; None where they were not measured yet. ``hidden``: the model's hidden size."""
    return _read().get(_key(device, dtype, size=_size(hidden)))


def rates_of(device: torch.device, dtype: torch.dtype, *, hidden: int) -> Rates | None:
    """Return the rates of a device, kept or measured now; None where its memory is too full to measure them.

    ``hidden``: the model's hidden size.
    """
    known = known_rates(device, dtype, hidden=hidden)
    if known is not None:
        return known
    size = _size(hidden)
    try:
        rates = measure(device, dtype, size=size)
    except torch.OutOfMemoryError:
        return None
    kept = {_key(device, dtype, size=size): rates} | _read()
    content = {name: kept[name].model_dump() for name in list(kept)[:_MOST_KEPT]}
    with suppress(DiskError, OSError):  # a cache that cannot be written is measured again
        path = rates_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n")
    return rates


def rates_file() -> Path:
    """Return the file of the kept rates, in HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "llmprune" / "rates.json"


def _read() -> dict[str, Rates]:
    """Return the kept rates, the newest first; none where the file is missing or damaged."""
    try:
        content = json.loads(rates_file().read_text(encoding="utf-8"))
        return {name: Rates(**values) for name, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, ValidationError):
        return {}


def _key(device: torch.device, dtype: torch.dtype, *, size: int) -> str:
    """Return the name of what the rates depend on."""
    parts = (platform.node(), device_name(device), torch.get_num_threads(), torch.__version__, dtype, size)
    return ", ".join(map(str, parts))


def _size(hidden: int) -> int:
    """Return the power of two next to a hidden size, within limits."""
    return int(min(max(2 ** round(torch.tensor(float(hidden)).log2().item()), _SMALLEST), _LARGEST))


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, *, size: int) -> Rates:
    """Measure the rates of a device, with matrices [size, size]."""
    with quick_products():
        products = _products(device, dtype, size=size)
    emulated = device.type == "cpu" and is_emulated(dtype)
    stream, plain = _stream(device), _products(device, dtype, size=size) if emulated else products
    return Rates(
        products=products,
        plain_products=plain,
        sums=products if dtype == torch.float32 else _products(device, torch.float32, size=size),
        stream=stream,
        narrow=_narrow(device, dtype, size=size, products=plain),
        copies=stream if device.type == "cpu" else _copies(device),
        files=_files(),
        call=_call(device),
    )


def _products(device: torch.device, dtype: torch.dtype, *, size: int) -> float:
    """Return the operations a second of a linear layer, with as many tokens as make the time long enough."""
    weight_XX = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    tokens = _LEAST_TOKENS
    while True:
        input_TX = torch.ones(tokens, size, device=device, dtype=dtype)
        seconds = _seconds(device, lambda value_TX=input_TX: linear(value_TX, weight_XX))  # type: ignore[misc]
        if seconds >= _LONG_ENOUGH or tokens >= _MOST_TOKENS:
            return 2 * tokens * size * size / seconds
        tokens *= 2 if seconds > _LONG_ENOUGH / 4 else 4


def _narrow(device: torch.device, dtype: torch.dtype, *, size: int, products: float) -> float:
    """Return the bytes of weights a second of linear layers with a few tokens, beside the time of their operations.

    There are as many matrices as no cache holds, as in a model.
    """
    matrix = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    count = max(_STREAM_BYTES // (matrix.nbytes), 1)
    weights = [matrix.clone() for _ in range(count)]
    input_TX = torch.ones(_FEW_TOKENS, size, device=device, dtype=dtype)
    seconds = _seconds(device, lambda: [linear(input_TX, weight_XX) for weight_XX in weights])
    read, computed = count * matrix.nbytes, 2 * _FEW_TOKENS * size * size * count / products
    return read / max(seconds - computed, seconds / 10)


def _stream(device: torch.device) -> float:
    value = torch.ones(_STREAM_BYTES // 4, device=device)
    result = torch.empty_like(value)
    return 2 * _STREAM_BYTES / _seconds(device, lambda: torch.mul(value, 2.0, out=result))


def _copies(device: torch.device) -> float:
    value = torch.ones(_STREAM_BYTES // 4).pin_memory()
    return _STREAM_BYTES / _seconds(device, lambda: value.to(device))


def _files() -> float:
    content = bytes(_FILE_BYTES)

    def write() -> float:
        with tempfile.TemporaryFile() as file:
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            return time.perf_counter() - began

    return _FILE_BYTES / min(write() for _ in range(_REPEATS))


def _call(device: torch.device) -> float:
    layer = torch.nn.Linear(8, 8, device=device)
    value = torch.ones(1, 8, device=device)
    repeats = 100

    def several() -> torch.Tensor:
        result = value
        for _ in range(repeats):
            result = layer(result)
        return result

    return _seconds(device, several, threads=1) / repeats


def _seconds(device: torch.device, compute: Callable[[], object], *, threads: int | None = None) -> float:
    """Return the shortest time of a computation after a warm-up, in seconds, as on a machine that does nothing else.

    On a CPU the time that other programs take is left out: the processor time of this process, divided by its threads,
    is then below the time that passed. ``threads``: that compute; None for all of torch's.
    """
    divided = torch.get_num_threads() if threads is None else threads

    def timed() -> float:
        began, used = time.perf_counter(), time.process_time()
        compute()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
            return time.perf_counter() - began
        passed, used = time.perf_counter() - began, time.process_time() - used
        return min(passed, used / divided)

    timed()
    return min(timed() for _ in range(_REPEATS))
