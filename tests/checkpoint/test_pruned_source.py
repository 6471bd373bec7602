"""Placement of the saved checkpoint like its base, and the memory that whole models need."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.devices import simulated_devices

from llmprune.checkpoint.model_memory import fit_together, memory_for_models, whole_model_bytes
from llmprune.checkpoint.placement import device_map_of_whole
from llmprune.checkpoint.result.pruned_source import pruned_source
from llmprune.recipe.model import ModelSource
from llmprune.testing import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 on disk."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").bfloat16().save_pretrained(folder)
    return folder


def test_a_device_map_is_translated_to_the_kept_layers(llama: Path, tmp_path: Path) -> None:
    """Kept layers and their parts get their new indices; removed layers go, and other modules stay."""
    device_map: dict[str, int | str] = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.layers.2.mlp": "cpu",
        "model.layers.2.self_attn": 1,
        "model.layers.3": "disk",
        "lm_head": 0,
    }
    base = ModelSource(id=str(llama), device_map=device_map, dtype="bfloat16")
    found = pruned_source(base, tmp_path, layers=(0, 2, 3))
    assert found.device_map == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1.mlp": "cpu",
        "model.layers.1.self_attn": 1,
        "model.layers.2": "disk",
        "lm_head": 0,
    }
    assert (found.id, found.dtype) == (str(tmp_path), "bfloat16")


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model": 0, "lm_head": 1}])
def test_a_device_map_without_layers_stays(llama: Path, tmp_path: Path, device_map: str | dict[str, int | str]) -> None:
    """A map that names no layer is that of the pruned model too."""
    base = ModelSource.model_validate({"id": str(llama), "device_map": device_map})
    assert pruned_source(base, tmp_path, layers=(1, 2)).device_map == device_map


def test_bytes_are_those_of_the_computation(llama: Path) -> None:
    """A bfloat16 checkpoint takes twice its bytes in float32."""
    stored = sum(one.numel() * 2 for one in tiny_model("llama").parameters())
    assert whole_model_bytes(ModelSource(id=str(llama))) == stored
    assert whole_model_bytes(ModelSource(id=str(llama), dtype="float32")) == 2 * stored


def test_models_fit_together_where_the_map_puts_them(llama: Path) -> None:
    """Limits of the recipe count on GPUs and in memory, as does what is free on a GPU."""
    size = whole_model_bytes(ModelSource(id=str(llama)))

    def fits(**settings: object) -> bool:
        source = ModelSource.model_validate({"id": str(llama), **settings})
        return fit_together([source, source])

    assert fits()
    assert fits(max_memory={"cpu": 3 * size})
    assert not fits(max_memory={"cpu": 2 * size})  # a part is for activations
    with simulated_devices(2):
        assert fits(max_memory={0: size, 1: 2 * size})
        assert not fits(max_memory={0: size, "cpu": 10 * size})
        assert fits(device_map="cpu", max_memory={0: size, "cpu": 10 * size})
        full = torch.ones(1, device="cuda:0")
        assert memory_for_models(ModelSource(id=str(llama), device_map={"": 0})) < torch.cuda.mem_get_info(0)[1]
        del full


@pytest.mark.parametrize(("on_machine", "on_disk"), [("1", False), ("2", True)])
def test_processes_of_a_machine_share_its_memory(
    on_machine: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model that fits the main memory, but not twice, is partly read from disk by two processes."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    available = SimpleNamespace(total=1 << 40, available=model.num_parameters() * 4 * 3 // 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": on_machine}.items():
        monkeypatch.setenv(name, value)
    with simulated_devices(2, memory=1):
        devices = device_map_of_whole(ModelSource(id=str(tmp_path)), model)
    assert devices is not None
    assert ("disk" in devices.values()) == on_disk
