"""Groups of the calibration windows."""

from __future__ import annotations

import torch
from helpers.devices import CopyKind, simulated_devices

from llmprune.layerwise.window_groups import WindowGroups


def test_each_group_gets_its_windows_of_a_batch() -> None:
    """A batch of windows of two groups is divided, one of a single group is handed on as it is."""
    values_NLD = torch.arange(24.0).view(6, 2, 2)
    groups = WindowGroups(torch.tensor([0, 1, 0, 1, 1, 1]), 3)
    first, second = (dict(groups.parts(batch, values_NLD[3 * batch :][:3])) for batch in (0, 1))
    assert torch.equal(first[0][0], values_NLD[[0, 2]].flatten(0, 1))
    assert torch.equal(first[1][0], values_NLD[[1]].flatten(0, 1))
    assert second.keys() == {1}
    assert second[1][0].data_ptr() == values_NLD[3:].data_ptr()


def test_indices_are_copied_to_a_device_once() -> None:
    """However often a layer's batches are divided, the device gets the indices of all of them in one copy."""
    groups = WindowGroups(torch.arange(8) % 2, 2)
    with simulated_devices(1) as devices:
        value_BLD = torch.ones(2, 3, 4, device="cuda")
        for batch in (0, 1, 2, 3, 0, 1):
            assert all(parts[0].is_cuda for _, parts in groups.parts(batch, value_BLD))
    assert [count for (kind, _), count in devices.copies.items() if kind is CopyKind.TO_DEVICE_PAGEABLE] == [1]
    assert not devices.waits
