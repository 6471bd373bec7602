"""Training of whole layers in pass 2, after their closed-form repairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.decoders import dense_decoder

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import Anatomy
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.repair.folds import Folds
from llmprune.prune.repair.layer_trainer import cloned
from llmprune.prune.repair.training_windows import TrainingWindows
from llmprune.prune.snapshots import Snapshots
from llmprune.recipe.refit import Refit
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (24, 24), generator=torch.Generator().manual_seed(0))


class _Stopped(Exception):
    pass


def _without(anatomy: Anatomy) -> Cut:
    """Remove the second layer from the end."""
    removed = anatomy.num_layers - 2
    return Cut(anatomy.num_layers, tuple(index for index in range(anatomy.num_layers) if index != removed))


def _prune(
    family: str,
    *,
    block: bool = True,
    dtype: torch.dtype = torch.float32,
    cut: Cut | None = None,
    snapshots: Snapshots | None = None,
    stop_at: int | None = None,
    detached: bool = False,
) -> tuple[dict[int, Tensors], list[LayerRecord], LayerwiseForward]:
    """Return the layers that this run wrote, the records of all, and the pruned model after its last layer.

    ``detached``: no gradient passes the layers.
    """
    model = tiny_model(family).to(dtype)
    anatomy = discover(model.config)
    dense = dense_decoder(model)
    cut = cut or _without(anatomy)
    written: dict[int, Tensors] = {}

    def write(index: int, tensors: Tensors) -> None:
        if index == stop_at:
            raise _Stopped
        written[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    for layer in pruned.layers if detached else ():
        layer.register_forward_hook(lambda _, __, output: output.detach())
    pruning = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(block=block), write=write)
    records, forward = pruning.run(WINDOWS, 8, snapshots=snapshots)
    return written, records, forward


@dataclass(frozen=True)
class _Run:
    """One llama without a layer: trained, and with its closed-form repair alone."""

    trained: dict[int, Tensors]
    records: list[LayerRecord]
    plain: dict[int, Tensors]
    without: list[LayerRecord]


@pytest.fixture(scope="module")
def llama() -> _Run:
    """Run both once for all tests."""
    trained, records, _ = _prune("llama")
    plain, without, _ = _prune("llama", block=False)
    return _Run(trained, records, plain, without)


def test_training_lowers_the_held_out_error(llama: _Run) -> None:
    """What is kept is better than the closed form on windows that the training did not see."""
    trained = [record.block for record in llama.records if record.block is not None]
    assert any(block.steps and block.after < block.before for block in trained)
    assert all(record.block is None for record in llama.without)
    assert llama.records[-1].error_refit is not None
    assert llama.without[-1].error_refit is not None
    assert llama.records[-1].error_refit < llama.without[-1].error_refit


@pytest.mark.parametrize("family", ["gemma2", "qwen2_moe", "lfm2", "mamba"])
def test_every_kind_of_layer_is_trained(family: str) -> None:
    """Norms after projections, experts and recurrent mixers can be differentiated; none ends worse than it began."""
    _, records, _ = _prune(family)
    trained = [record.block for record in records if record.block is not None]
    assert trained
    assert all(block.steps is not None and block.after <= block.before for block in trained)


def test_layers_before_the_first_cut_are_not_trained(llama: _Run) -> None:
    """A layer that gets and gives the dense hidden states is written as it was."""
    untouched = [new for new, record in enumerate(llama.records) if record.block is None]
    assert untouched
    for new in untouched:
        assert all(torch.equal(llama.trained[new][name], llama.plain[new][name]) for name in llama.plain[new])


def test_all_weights_of_a_layer_are_trained(llama: _Run) -> None:
    """Norms, attention and MLP change."""
    new = next(new for new, record in enumerate(llama.records) if record.block and record.block.steps)
    assert not any(torch.equal(llama.trained[new][name], llama.plain[new][name]) for name in llama.plain[new])


def test_half_precision_is_trained_in_float32() -> None:
    """Layers in bfloat16 are trained on float32 copies of their weights, and written in bfloat16."""
    trained, records, _ = _prune("llama", dtype=torch.bfloat16)
    assert any(record.block and record.block.steps for record in records)
    assert all(tensor.dtype is torch.bfloat16 for tensors in trained.values() for tensor in tensors.values())


def test_a_layer_that_meets_its_target_keeps_its_weights() -> None:
    """Where nothing is lost there is nothing to train."""
    model = tiny_model("llama")
    anatomy = discover(model.config)
    key = f"0.{anatomy.units[0][0].path}"
    width = anatomy.units[0][0].width
    whole = Cut(anatomy.num_layers, tuple(range(anatomy.num_layers)), neurons={key: torch.arange(width)})
    trained, records, _ = _prune("llama", cut=whole)
    assert {record.block.steps for record in records if record.block} == {0}
    weights = dense_decoder(model).tensors(0)
    assert all(torch.equal(trained[0][name], weights[name]) for name in weights)


def test_continued_equals_uninterrupted(llama: _Run, tmp_path: Path) -> None:
    """A run that was stopped in the middle writes the same weights as one that was not."""
    last = len(llama.trained) - 1
    with pytest.raises(_Stopped):
        _prune("llama", snapshots=Snapshots(tmp_path, "same", share=1e9), stop_at=last)
    rest, continued, _ = _prune("llama", snapshots=Snapshots(tmp_path, "same", share=1e9))
    assert sorted(rest) == [last]
    assert continued == llama.records
    assert all(torch.equal(tensor, llama.trained[last][name]) for name, tensor in rest[last].items())


def test_tensors_that_share_memory_still_do() -> None:
    """Copies of a layer's tensors share memory where the originals do."""
    shared = torch.ones(2)
    copies = cloned({"first": shared, "second": shared, "other": torch.ones(2)})
    assert copies["first"] is copies["second"]
    assert copies["first"].data_ptr() != copies["other"].data_ptr() != shared.data_ptr()


def test_a_layer_without_gradients_keeps_its_closed_form() -> None:
    """A layer through which no gradient passes is not trained, its record says so, and the run goes on."""
    _, records, _ = _prune("llama", detached=True)
    assert {record.block.steps for record in records if record.block} == {None}


def test_windows_that_judge_are_not_trained_on() -> None:
    """They are half of the model's own windows, or a source in turn, or every eighth window of a single source."""
    sources_N = torch.tensor([0, 1, 0, 1, 2, 2])
    generated = Folds.of(torch.zeros(6, 4), sources_N, generated_N=sources_N == 2)
    assert generated.judging(0).tolist() == generated.judging(1).tolist() == [False] * 4 + [True, False]
    several = Folds.of(torch.zeros(6, 4), sources_N)
    judging = [several.judging(layer).nonzero().flatten().tolist() for layer in range(4)]
    assert judging == [[0, 2], [1, 3], [4, 5], [0, 2]]
    assert Folds.of(torch.arange(64).view(16, 4), None).judging(0).nonzero().flatten().tolist() == [7, 15]


def test_processes_share_the_windows_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window of a step is one process's, with the share in the loss that one process alone would give it."""
    folds = Folds.of(
        torch.zeros(10, 2, dtype=torch.int64), torch.tensor([0] * 6 + [1] * 4), generated_N=torch.arange(10) >= 6
    )

    def steps(processes: int) -> list[list[tuple[int, float]]]:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        found = []
        for number in range(processes):
            monkeypatch.setenv("RANK", str(number))
            own = TrainingWindows([], folds, batch_size=2, seed=0).of_layer(3)
            found.append([list(own.shares(windows_S)) for windows_S in own.steps()])
        return [sorted(one for part in parts for one in part) for parts in zip(*found, strict=True)]

    assert steps(1) == steps(2)
    assert all(sum(share for _, share in step) == pytest.approx(1) for step in steps(2))
