"""Models on simulated GPUs: what a layer needs is on that layer's device, and no result depends on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.devices import home_of, simulated_devices
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import FusedSlice, PrunableDim
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.common import distributed as processes
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import add_to_slice, cut_decoder
from llmprune.cut.decision import Cut
from llmprune.evaluation.perplexity import compare_predictions
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.model import ModelSource
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))
# Each computes buffers from its config, in its layers or (XGLM) beside them.
WITH_BUFFERS = ("gptj", "gpt_neo", "codegen", "falcon_h1", "falcon_mamba", "moshi", "xglm")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return _saved(tmp_path_factory.mktemp("llama"), "llama")


def _saved(folder: Path, family: str, **fields: Any) -> Path:
    tiny_model(family, **fields).save_pretrained(folder)
    return folder


def _load(folder: Path, device_map: Any = "auto") -> Any:
    return open_decoder(ModelSource(id=str(folder), device_map=device_map))


def _everything(folder: Path, device_map: Any = "auto", store: HiddenStateStore | None = None) -> Iterator[Tensor]:
    """Scores of a model, and its layers and logits after two cuts with a refit: without its heads, and with them and
    sparse.
    """
    dense = _load(folder, device_map)
    anatomy = discover(dense.skeleton.config)
    width, experts = Activation() if anatomy.widths else None, Reap() if anatomy.experts else None
    scores = score(
        dense,
        anatomy,
        criteria=ScoringCriteria(depth=BlockInfluence(), width=width, heads=Activation(), experts=experts),
        calibration=CalibrationBatches(IDS, 2),
    )
    for found in (scores.neurons, scores.heads, scores.experts, scores.routed):
        assert not any(value.is_cuda for value in found.values())  # they are chosen from on the CPU
        yield from found.values()
    widths = {field: size * 2 // 3 // 32 * 32 for field, size in anatomy.widths.items()}
    groups = anatomy.heads.count // 2 if anatomy.heads and anatomy.heads.refusal is None else None
    experts_kept = anatomy.experts.count // 2 if anatomy.experts else None
    written: list[Tensor] = []
    for sparsity, heads in ((None, None), (Sparsity(pattern=0.5), groups)):
        cut = choose_cut(
            anatomy, scores, sizes=PlannedSizes((2,), 3, widths=widths, num_experts=experts_kept, kv_groups=heads)
        )
        pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
        run = Pruning(
            dense,
            pruned,
            anatomy=anatomy,
            cut=cut,
            refit=Refit(up=True),
            write=lambda _, layer: written.extend(layer.values()),
            sparsity=sparsity,
        )
        yield run.run(IDS, 2, store=store)[1].logits(0)
    yield from written


@pytest.mark.parametrize(
    ("family", "devices", "device_map", "stream_memory"),
    [
        ("gemma2", 2, "auto", 1),
        ("mixtral", 1, "cpu", None),  # the GPU computes, the weights wait on the CPU
    ],
)
def test_results_do_not_depend_on_the_devices(
    family: str, devices: int, device_map: str, stream_memory: int | None, tmp_path: Path
) -> None:
    """Scores, written layers and logits are those of the CPU to the bit: split over two GPUs with hidden states in
    files, or on one with weights on the CPU.
    """
    _saved(tmp_path, family)
    on_cpu = list(_everything(tmp_path, "cpu"))
    with simulated_devices(devices):
        store = HiddenStateStore(stream_memory, tmp_path)
        found = [value.cpu() for value in _everything(tmp_path, device_map, store)]
    assert len(found) == len(on_cpu)
    assert all(map(torch.equal, found, on_cpu))


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_computed_buffers_are_where_they_are_needed(family: str, tmp_path: Path) -> None:
    """Of a model on a GPU a cut is proven against layers that are built on the CPU, and the pruned model runs."""
    _saved(tmp_path, family)
    with simulated_devices(1):
        dense = _load(tmp_path)
        LayerwiseForward(
            dense, IDS[:1], batch_size=1
        )  # visits a layer of each class, whose buffers are on the GPU from then on
        pruned = cut_decoder(dense, anatomy=discover(dense.skeleton.config), cut=Cut(4, (0, 1, 3)))
        forward = LayerwiseForward(pruned, IDS[:1], batch_size=1)
        for index in range(3):
            with pruned.layer(index) as layer:
                forward.pass_through(index, layer)
        assert forward.logits(0).is_cuda


def test_an_up_projection_is_changed_on_its_device() -> None:
    """Where gate and up projection are one tensor, only the rows of the latter change."""
    with simulated_devices(1):
        weight, delta_FI = torch.zeros(6, 4, device="cuda:0"), torch.ones(3, 4, device="cuda:0")
        changed = add_to_slice(weight, FusedSlice(PrunableDim("gate_up_proj.weight", 0, (1, 1)), 1), delta_FI=delta_FI)
        assert changed.is_cuda
        assert changed.sum(1).tolist() == [0, 0, 0, 4, 4, 4]


def _prune_half(dense: Any, ids_NL: Tensor) -> None:
    anatomy = discover(dense.skeleton.config)
    scores = score(
        dense,
        anatomy,
        criteria=ScoringCriteria(depth=BlockInfluence(), width=Activation(), heads=Activation()),
        calibration=CalibrationBatches(ids_NL, 2),
    )
    cut = choose_cut(
        anatomy, scores, sizes=PlannedSizes(None, 3, widths=dict.fromkeys(anatomy.widths, 32), kv_groups=1)
    )
    Pruning(
        dense,
        cut_decoder(dense, anatomy=anatomy, cut=cut),
        anatomy=anatomy,
        cut=cut,
        refit=Refit(up=True),
        write=lambda *_: None,
    ).run(ids_NL, 2)


def _compare_with_itself(dense: Any, ids_NL: Tensor) -> None:
    compare_predictions(dense, dense, windows_NL=ids_NL, batch_size=2)


@pytest.mark.parametrize("use", [_prune_half, _compare_with_itself])
def test_memory_on_a_device_does_not_grow_with_the_windows(use: Callable[[Any, Tensor], None], tmp_path: Path) -> None:
    """Twice the windows take no more of the GPU than four figures for each token, and a hidden state has 32.

    In a model where norms follow the output projections too.
    """
    _saved(tmp_path, "gemma2")
    peaks = []
    for windows in (8, 16):
        with simulated_devices(1) as devices:
            use(_load(tmp_path), IDS[:1].repeat(windows, 1))
            peaks.append(devices.peak["cuda:0"])
    assert peaks[1] - peaks[0] <= 8 * IDS.shape[1] * 4 * torch.float32.itemsize


def test_arguments_made_of_tokens_leave_the_device(tmp_path: Path) -> None:
    """What Gemma 4 hands each layer of every token is kept on the CPU, but for one batch; shared masks are not."""
    _saved(tmp_path, "gemma4_text")
    with simulated_devices(1):
        forward = LayerwiseForward(_load(tmp_path), IDS, batch_size=2)
        kept = [[home_of(value).type for call in calls for value in _arguments(call)] for calls in forward.calls]
    assert set(kept[0]) == {"cuda"}
    assert set(kept[1]) == {"cuda", "cpu"}


def test_sums_are_exchanged_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL adds up nothing that is on the CPU; the total comes back to where the sum was."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_state", lambda: SimpleNamespace(device=torch.device("cuda:0")))
    monkeypatch.setattr(processes, "_meet", lambda step: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2 if tensor.is_cuda else 1))
    own = torch.ones(3)
    with simulated_devices(1):
        processes.sum_over_processes([own])
        assert own.tolist() == [2.0] * 3
        assert not own.is_cuda


def _arguments(call: Any) -> list[Tensor]:
    return [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
