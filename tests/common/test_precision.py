"""Products that are solved with are exact, whatever the user set for the model's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.random_inputs import windows
from torch.overrides import TorchFunctionMode

from llmprune.anatomy.discovery import discover
from llmprune.common.linalg.precision import exact_products, float64_device, float64_matrix_device
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity.methods.sparsegpt import SparseGPT
from llmprune.testing import tiny_model

CUDA: Any = torch.backends.cuda
CPU: Any = torch.backends.mkldnn


def _set_by_both(value: str) -> None:
    torch.set_float32_matmul_precision(value)


def _set_by_tf32() -> None:
    CUDA.matmul.allow_tf32 = True


def _set_for_cuda() -> None:
    CUDA.matmul.fp32_precision = "tf32"


def _set_for_all() -> None:
    torch.backends.fp32_precision = "tf32"


SETTINGS: dict[str, Callable[[], None]] = {
    "high": lambda: _set_by_both("high"),
    "medium": lambda: _set_by_both("medium"),
    "allow_tf32": _set_by_tf32,
    "fp32_precision of CUDA": _set_for_cuda,
    "fp32_precision of all": _set_for_all,
}


def _state() -> list[Any]:
    """Every setting; None where torch refuses to tell because both of its interfaces were used."""
    found: list[Any] = [CUDA.matmul.fp32_precision, CPU.matmul.fp32_precision, torch.backends.fp32_precision]
    for ask in (torch.get_float32_matmul_precision, lambda: CUDA.matmul.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Torch's settings as they are when it is imported."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    CUDA.matmul.fp32_precision = CPU.matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_users_setting_holds_again_afterwards(name: str) -> None:
    """By either of torch's interfaces, also after an error."""
    SETTINGS[name]()
    before = _state()
    for error in (False, True):
        try:
            with exact_products():
                assert CUDA.matmul.fp32_precision == "ieee"
                assert CPU.matmul.fp32_precision not in ("tf32", "bf16")
                with exact_products():
                    assert CUDA.matmul.fp32_precision == "ieee"
                assert CUDA.matmul.fp32_precision == "ieee"
                if error:
                    raise KeyError
        except KeyError:
            pass
        assert _state() == before


def test_a_later_setting_for_all_products_still_counts() -> None:
    """What follows the general setting before goes on to follow it."""
    torch.backends.fp32_precision = "tf32"
    with exact_products():
        pass
    torch.backends.fp32_precision = "ieee"
    assert CUDA.matmul.fp32_precision == "ieee"


def test_nothing_is_set_where_products_are_exact() -> None:
    """Torch's default is left alone."""
    before = _state()
    with exact_products():
        assert _state() == before


class _Recorder(TorchFunctionMode):
    """Settings under which each function is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = defaultdict(set)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.__name__].add(CUDA.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_sums_and_solves_are_exact_and_layers_are_the_users() -> None:
    """Gram matrices, Cholesky factors and the steps of all solvers, against the layers' own products."""
    model = tiny_model("llama")
    dense, anatomy = dense_decoder(model), discover(model.config)
    neurons = {f"{layer}.mlp": torch.arange(64) for layer in (0, 2, 3)}
    cut = Cut(4, (0, 2, 3), {"intermediate_size": 64}, neurons)
    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    torch.set_float32_matmul_precision("high")
    with _Recorder() as recorder:
        for sparsity in (None, Sparsity(pattern=0.5), Sparsity(pattern="4:8", method=SparseGPT())):
            settings = Pruning(
                dense,
                pruned,
                anatomy=anatomy,
                cut=cut,
                refit=Refit(up=True),
                write=lambda _, __: None,
                sparsity=sparsity,
            )
            settings.run(windows(8, 12), 4)
    solving = ("addmm", "addmm_", "linalg_cholesky_ex", "cholesky_solve")
    assert all(recorder.seen[name] == {"ieee"} for name in solving)
    assert recorder.seen["linear"] == {"tf32"}


def test_devices_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have none; of NVIDIA's those for data centres are quick at it."""
    capabilities = {0: (9, 0), 1: (8, 9), 2: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    devices = [torch.device(name) for name in ("cpu", "mps", "cuda:0", "cuda:1", "cuda:2")]
    assert [str(float64_device(device)) for device in devices] == ["cpu", "cpu", "cuda:0", "cuda:1", "cuda:2"]
    assert [str(float64_matrix_device(device)) for device in devices] == ["cpu", "cpu", "cuda:0", "cpu", "cpu"]
