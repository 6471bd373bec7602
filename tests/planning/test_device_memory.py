"""The memory of each device in a plan, and the batch size that it allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command, save_model, write_recipe, write_text
from helpers.devices import simulated_devices
from helpers.public_configs import LLAMA_31_8B
from helpers.tiny import structure_of

from llmprune.planning.plan_schema import Plan
from llmprune.recipe.recipe import Recipe

GB = 10**9


def _plan(folder: Path, *overrides: str, **options: Any) -> Plan:
    (folder / "config.json").write_text(json.dumps(LLAMA_31_8B))
    text = (
        f"model: {{id: '{folder}'}}\ncalibration: {{dataset: text.txt, self_generated: 0}}\n"
        "depth: {remove: 4, criterion: {kind: block_influence}}\nwidth: {mlp: 0.75}\n"
    )
    return structure_of(Recipe.parse(text, overrides), **options)


@pytest.mark.parametrize(("memory", "batch"), [(80 * GB, 8), (16 * GB, 8), (11 * GB, 4), (9 * GB, 2), (7 * GB, 1)])
def test_the_batch_is_the_largest_that_fits(memory: int, batch: int, tmp_path: Path) -> None:
    """Of 2048 tokens at most 8 windows, and fewer on a small GPU; all that the run needs fits in what is free."""
    with simulated_devices(1, memory=memory):
        plan = _plan(tmp_path)
    gpu, host = plan.devices
    assert plan.batch_sizes.calibration == batch
    assert (gpu.device, host.device) == ("cuda:0", "cpu")
    assert gpu.working + gpu.resident <= gpu.free == memory


def test_the_cpu_has_four_windows_and_the_recipe_decides(tmp_path: Path) -> None:
    """A number in the recipe is taken as it is."""
    assert _plan(tmp_path).batch_sizes.calibration == 4
    with simulated_devices(1):
        assert _plan(tmp_path, "calibration.batch_size=3").batch_sizes.calibration == 3


def test_the_products_of_kept_and_removed_neurons_are_planned_with(tmp_path: Path) -> None:
    """Where most neurons go, they are larger than another matrix of those that are kept."""
    kept, width, hidden, folds = 14336 // 4, 14336, 4096, 2
    statistics = _plan(tmp_path, "width.mlp=0.25").memory.statistics
    assert statistics >= 4 * kept * (folds * kept + (width - kept) + 4 * hidden)


def test_memory_of_other_programs_is_not_planned_with(tmp_path: Path) -> None:
    """A GPU that another program fills has room for fewer windows."""
    with simulated_devices(1, memory=16 * GB) as devices:
        devices.used["cuda:0"] = 6 * GB
        plan = _plan(tmp_path)
    gpu = plan.devices[0]
    assert (plan.batch_sizes.calibration, gpu.free, gpu.total) == (4, 10 * GB, 16 * GB)
    assert gpu.working <= gpu.free


def test_a_plan_for_another_process_takes_no_memory_on_the_gpus(tmp_path: Path) -> None:
    """A service plans beside the runs that have the GPUs; a run that will have one finds all of its memory."""
    with simulated_devices(2, memory=16 * GB) as devices:
        devices.used["cuda:0"] = 6 * GB
        plan = _plan(tmp_path, elsewhere=True)
    assert devices.contexts == set()
    assert [gpu.free for gpu in plan.devices[:2]] == [16 * GB, 16 * GB]


def test_hidden_states_come_before_layers(tmp_path: Path) -> None:
    """They are copied for every layer, layers once a pass: a device keeps layers when it has all hidden states."""
    found = []
    for memory in (24 * GB, 32 * GB, 80 * GB):
        with simulated_devices(1, memory=memory):
            plan = _plan(tmp_path)
        found.append((plan.devices[0].hidden_states == plan.memory.hidden_states, plan.devices[0].resident > 0))
    assert found == [(False, False), (True, True), (True, True)]


def test_processes_share_windows_and_main_memory(tmp_path: Path) -> None:
    """Each GPU has the hidden states of its process's windows; of the main memory the share of one is stated."""
    with simulated_devices(2, memory=80 * GB):
        alone = _plan(tmp_path)
        plan = _plan(tmp_path, starts=2)
    assert (alone.processes, plan.processes) == (1, 2)
    assert [gpu.device for gpu in plan.devices] == ["cuda:0", "cuda:1", "cpu"]
    assert plan.devices[1].hidden_states == alone.devices[1].hidden_states // 2
    assert plan.devices[2].total == alone.devices[2].total // 2
    recipe = write_recipe(tmp_path / "recipe.yaml", save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt"))
    with simulated_devices(2) as devices:
        devices.used["cuda:1"] = devices.memory[1] - 2**16
        shown = command("plan", recipe)
    assert "Memory on cuda:1: about" in shown.out
    assert "more than the 65.5 KB free: embeddings" in shown.out.replace("\n", " ")
    assert "Memory on cpu, for each of 2 processes: about" in shown.out
    assert "for 2 processes and files" in shown.out.replace("\n", " ")


@pytest.mark.parametrize("device_map", ["{'': 7}", "{'': 'cuda:7'}", "{'': tpu}"])
def test_a_device_that_is_absent_is_a_problem_of_the_plan(device_map: str, tmp_path: Path) -> None:
    """Sizes are shown all the same, and the device that the recipe names is refused with a sentence."""
    recipe = write_recipe(tmp_path / "recipe.yaml", save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt"))
    with simulated_devices(1):
        shown = command("plan", recipe, "--set", f"model.device_map={device_map}")
    assert shown.code == 2
    assert "Memory on cuda:0: about" in shown.out
    assert shown.err.startswith("llmprune: model.device_map: ")


def test_a_run_is_refused_where_no_batch_fits(tmp_path: Path) -> None:
    """The plan says so too, with the sizes and the remedy; on a larger machine the same recipe may run."""
    with simulated_devices(1, memory=4 * GB):
        plan = _plan(tmp_path)
    assert plan.shortage is not None
    assert "cuda:0 has 4 GB, and one layer needs " in plan.shortage
    assert "CUDA_VISIBLE_DEVICES=" in plan.shortage
    recipe = write_recipe(tmp_path / "recipe.yaml", save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt"))
    with simulated_devices(1, memory=2**16):
        shown, done = command("plan", recipe), command("run", recipe, "--output", tmp_path / "out")
    assert shown.code == 0
    assert "Too little memory here: cuda:0 has 65.5 KB" in shown.out.replace("\n", " ")
    assert done.code == 2
    assert "cuda:0 has 65.5 KB, and one layer needs" in done.err


def test_what_a_device_map_leaves_to_the_cpu_is_planned_on_the_first_gpu(tmp_path: Path) -> None:
    """Layers and embeddings on the CPU or on disk are computed there, beside the GPU that the map names."""
    devices = {"model": "cpu", "lm_head": "disk", "model.layers.3": 1}
    with simulated_devices(2, memory=80 * GB):
        plan = _plan(tmp_path, f"model.device_map={json.dumps(devices)}")
    assert [device.device for device in plan.devices] == ["cuda:0", "cuda:1", "cpu"]
