"""The choice of GPUs, by what torch counts: no GPU is needed."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from llmprune.common import devices
from llmprune.common.devices import Devices, choose_gpus, describe_gpus, use_gpus, visibility
from llmprune.common.distributed import environment_of_one
from llmprune.common.errors import RecipeError


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, which torch counts by CUDA_VISIBLE_DEVICES, in a process that has not used CUDA."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6f, 7")
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "_in_use", "all")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)


@pytest.mark.parametrize(
    ("wanted", "chosen", "visible"),
    [
        ("all", (0, 1, 2, 3), "4,5,GPU-6f,7"),
        (2, (0, 1), "4,5"),
        ((2, 0), (2, 0), "GPU-6f,4"),
    ],
)
@pytest.mark.usefixtures("four")
def test_gpus_are_counted_as_torch_sees_them(wanted: Devices, chosen: tuple[int, ...], visible: str) -> None:
    """Indices are those of the visible GPUs, and processes see the chosen ones only, in their order."""
    assert choose_gpus(wanted) == chosen
    assert visibility(chosen) == {"CUDA_VISIBLE_DEVICES": visible}


@pytest.mark.usefixtures("four")
def test_absent_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which GPUs there are, and what hides others."""
    with pytest.raises(
        RecipeError, match=r"devices: 8 GPUs asked, and torch sees GPUs 0 to 3 \(CUDA_VISIBLE_DEVICES=4,5"
    ):
        choose_gpus(8)
    with pytest.raises(RecipeError, match=r"devices: GPUs 7, 9 asked"):
        choose_gpus((0, 7, 9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_gpus("all") == ()
    with pytest.raises(RecipeError, match=r"devices: 1 GPU asked, and torch sees no GPU.*; leave it out, or write dev"):
        choose_gpus(1)


@pytest.mark.usefixtures("four")
def test_one_process_sees_only_the_chosen_gpus() -> None:
    """They are numbered anew, and the same choice holds for the next run of the process."""
    use_gpus((3, 1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,5"
    use_gpus((3, 1))
    use_gpus("all")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,5"
    with pytest.raises(RecipeError, match="GPU 2 asked, and torch sees GPUs 0 to 1"):
        use_gpus((2,))


@pytest.mark.usefixtures("four")
def test_a_choice_after_cuda_began_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reads the list of visible GPUs once: the message names the setting for the next start."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    use_gpus("all")
    with pytest.raises(RecipeError, match="start it with CUDA_VISIBLE_DEVICES=5 and devices: all"):
        use_gpus((1,))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,GPU-6f, 7"


@pytest.mark.usefixtures("four")
def test_a_launcher_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun every visible GPU counts: its processes have divided them."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert choose_gpus((9,)) == (0, 1, 2, 3)


def test_the_smallest_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory differs, a note names the GPU with the least; a few MB between equal cards are no difference."""
    sizes = [80 * 10**9, 80 * 10**9 - 10**8]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="A100", total_memory=sizes[index])
    )
    assert describe_gpus()[1] == ""
    sizes.append(24 * 10**9)
    described, note = describe_gpus()
    assert described == "1 × A100 (80 GB), 1 × A100 (79.9 GB), 1 × A100 (24 GB)"
    assert note == "GPU 2 (A100, 24 GB) has the least memory of them: it limits what fits"


def test_a_program_of_its_own_is_none_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launchers set is left out of its environment; what the user set stays."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "mine")
    found = environment_of_one()
    assert [name for name in found if name.startswith(("TORCHELASTIC_", "MASTER_")) or "RANK" in name] == []
    assert ("WORLD_SIZE" in found, found["HF_HOME"]) == (False, "mine")
