"""Processes and devices of a run, decided from the recipe and the number of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmprune.common.errors import RecipeError
from llmprune.planning.devices import count_processes, require_devices
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder.replacing import recipe_of_model


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, without a launcher."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def _recipe(samples: int = 128, devices: Any = "all", **model: Any) -> Recipe:
    calibration = {"dataset": "text.txt", "samples": samples, "self_generated": 0}
    return Recipe.model_validate({"model": {"id": "base"} | model, "calibration": calibration, "devices": devices})


@pytest.mark.parametrize(
    ("recipe", "processes"),
    [
        (_recipe(), 4),
        (_recipe(devices=3), 3),
        (_recipe(devices=[3]), 1),
        (_recipe(device_map="cpu"), 4),
        (_recipe(device_map="balanced"), 1),
        (_recipe(device_map={"": 2}), 1),
        (_recipe(max_memory={"cpu": "64GiB"}), 4),
        (_recipe(max_memory={0: "20GiB", "cpu": "64GiB"}), 1),
    ],
)
def test_each_chosen_gpu_has_a_process(recipe: Recipe, processes: int) -> None:
    """But a recipe that spreads the layers over devices itself has one process that uses all of them."""
    assert count_processes(recipe, halves=False) == (processes, "")


def test_no_process_is_without_a_window() -> None:
    """With fewer windows than GPUs fewer processes are started, and a note says so; halves need two windows each."""
    processes, note = count_processes(_recipe(samples=3), halves=False)
    assert processes == 3
    assert note.startswith("3 of the 4 GPUs work at a time, because calibration has only 3 windows; raise")
    assert count_processes(_recipe(samples=7), halves=True)[0] == 3
    assert count_processes(_recipe(samples=1), halves=True)[0] == 1


def test_every_absent_device_is_named() -> None:
    """A device map and memory limits count the chosen GPUs from 0."""
    require_devices(_recipe(device_map={"model": 3, "lm_head": "cuda:0", "model.norm": "cpu", "x": "disk"}))
    require_devices(_recipe(devices=[2, 3], max_memory={1: "1GB", "disk": "1GB"}))
    with pytest.raises(RecipeError) as found:
        require_devices(_recipe(devices=2, device_map={"": 2, "a": "cuda:7", "b": "gpu"}, max_memory={5: "1GB"}))
    there = "torch sees GPUs 0 to 3, and this run uses 2 of them, counted from 0; name one of these, cpu or disk"
    assert found.value.problems == [
        f"model.device_map: names GPU 2; {there}",
        f"model.device_map: names cuda:7; {there}",
        "model.device_map: 'gpu' is no device; write the number of a GPU, cpu or disk",
        f"model.max_memory: names GPU 5; {there}",
    ]


def test_the_cpu_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the default is one process on the CPU, and named GPUs are refused."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_processes(_recipe(), halves=False) == (1, "")
    require_devices(_recipe(device_map={"": "cpu"}, max_memory={"cpu": "1GB"}))
    with pytest.raises(RecipeError, match=r"names GPU 0; torch sees no GPU.*, and this run computes on the CPU"):
        require_devices(_recipe(device_map={"": 0}))


def test_the_devices_do_not_make_another_model() -> None:
    """A finished run is continued or replaced whatever GPUs it ran on."""
    assert recipe_of_model(_recipe(devices=2)) == recipe_of_model(_recipe())
