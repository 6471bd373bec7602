"""Hidden states of a snapshot in other batches than those that they were saved in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.devices import simulated_devices

from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.records import LayerRecord
from llmprune.prune.snapshots import Progress, Snapshots


def _in_batches(windows_NLD: torch.Tensor, batch_size: int) -> HiddenStates:
    hidden_states = HiddenStates()
    for batch_BLD in windows_NLD.split(batch_size):
        hidden_states.append(batch_BLD.clone())
    return hidden_states


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_a_run_continues_in_other_batches(batch_size: int, tmp_path: Path) -> None:
    """Each window is where it was, whether the batches divide those that were saved or not."""
    dense_NLD, pruned_NLD = torch.randn(2, 7, 3, 2, generator=torch.Generator().manual_seed(0))
    saved = Snapshots(tmp_path / "state", "same")
    saved.load()
    record = LayerRecord(0, 0.0, None)
    saved.save(Progress([record]), [_in_batches(dense_NLD, 5), _in_batches(pruned_NLD, 5)])
    later = Snapshots(tmp_path / "state", "same")
    assert later.load().records == [record]
    found = [_in_batches(torch.zeros(7, 3, 2), batch_size) for _ in range(2)]
    later.restore(found)
    for hidden_states, windows_NLD in zip(found, (dense_NLD, pruned_NLD), strict=True):
        assert [len(batch_BLD) for batch_BLD in hidden_states] == [len(part) for part in windows_NLD.split(batch_size)]
        assert torch.equal(torch.cat(list(hidden_states)), windows_NLD)


@pytest.mark.parametrize("device_bytes", [0, 1 << 20], ids=["host", "device"])
def test_a_run_continues_on_a_gpu(device_bytes: int, tmp_path: Path) -> None:
    """Restored hidden states are the GPU's: those that pass 1 saved replace them, and do not change copies of them."""
    with simulated_devices(1):
        values = [torch.full((2, 3, 4), float(number), device="cuda:0") for number in range(3)]
        store = HiddenStateStore(device_bytes=device_bytes)
        found = [store.allocate(values[0], 6) for _ in range(2)]
        for hidden_states in found:
            for value_BLD in values:
                hidden_states.append(value_BLD)
        found[0].save(tmp_path / "pass-1")
        saved = Snapshots(tmp_path / "state", "same")
        saved.load()
        for batch in range(3):
            found[0][batch] = values[batch] + 10
        saved.save(Progress([LayerRecord(0, 0.0, None)]), found)
        later = Snapshots(tmp_path / "state", "same")
        later.load()
        later.restore(found)
        device = found[0].device
        assert device == torch.device("cuda", 0)
        copy = store.allocate(found[0].at(0, device), 6)
        for batch in range(3):
            copy.append(found[0].at(batch, device))
        found[0].load(tmp_path / "pass-1")
        assert [float(value_BLD.mean()) for value_BLD in copy] == [10, 11, 12]
        assert [float(found[0].at(batch, device).mean()) for batch in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("durable", ["1", "0"])
def test_a_run_continues_on_another_machine(durable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots that are flushed to disk are valid after another boot; a copy by hard links keeps what it had."""
    monkeypatch.setenv("LLMPRUNE_DURABLE_SNAPSHOTS", durable)
    saved = Snapshots(tmp_path / "state", "same", share=1e9)
    saved.load()
    record = LayerRecord(0, 0.0, None)
    streams = [_in_batches(torch.zeros(2, 3, 2), 2) for _ in range(2)]
    saved.save(Progress([record]), streams)
    (file,) = (tmp_path / "state").glob("dense-*")
    (tmp_path / "linked").hardlink_to(file)
    before = file.read_bytes()
    for _ in range(2):  # the second one replaces the file
        saved.save(Progress([record]), [_in_batches(torch.ones(2, 3, 2), 2) for _ in range(2)])
    assert file.read_bytes() != before == (tmp_path / "linked").read_bytes()
    monkeypatch.setattr("llmprune.prune.snapshots.boot", lambda: "another")
    assert bool(Snapshots(tmp_path / "state", "same").load().records) == (durable == "1")
