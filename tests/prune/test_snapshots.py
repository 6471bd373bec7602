"""Hidden states of a snapshot in other batches than those that they were saved in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmprune.layerwise.hidden_states import HiddenStates
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
    saved.save(Progress([record]), _in_batches(dense_NLD, 5), pruned=_in_batches(pruned_NLD, 5))
    later = Snapshots(tmp_path / "state", "same")
    assert later.load().records == [record]
    found = [_in_batches(torch.zeros(7, 3, 2), batch_size) for _ in range(2)]
    later.restore(*found)
    for hidden_states, windows_NLD in zip(found, (dense_NLD, pruned_NLD), strict=True):
        assert [len(batch_BLD) for batch_BLD in hidden_states] == [len(part) for part in windows_NLD.split(batch_size)]
        assert torch.equal(torch.cat(list(hidden_states)), windows_NLD)
