"""Runs on simulated GPUs of little memory: what the plan says of them, and retries where it does not suffice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import (
    Outcome,
    command,
    report_in,
    save_model,
    verify_here,
    write_recipe,
    write_text,
)
from helpers.devices import simulated_devices
from helpers.whole_runs import every_measure
from safetensors.torch import load_file
from transformers import modeling_utils

from llmprune.pipeline import verify_saved
from llmprune.planning.memory.device_memory import DeviceMemory


def _run(folder: Path, base: Path, text: Path, **sections: Any) -> Outcome:
    recipe = write_recipe(folder.with_suffix(".yaml"), base, text, **sections)
    return command("run", recipe, "--output", folder)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model/model.safetensors")
    return tensors


@pytest.fixture
def small_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification in this process; transformers allocates more than a gigabyte ahead, which tiny devices lack."""
    verify_here(monkeypatch)
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: None)


@pytest.mark.usefixtures("small_devices")
def test_pinned_memory_is_returned_and_its_lack_is_not_the_gpus(tmp_path: Path) -> None:
    """Verification and evaluation find the main memory that copies needed; where that is full, the error says so."""
    base, text = save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt")
    texts = {"dataset": str(text), "samples": 8, "sequence_length": 128}
    kept = []

    def verify(*args: Any, **options: Any) -> Any:
        kept.append((devices.pinned.kept, devices.pinned.used))
        return verified(*args, **options)

    verified = verify_saved.verify
    with simulated_devices(1) as devices, pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_saved, "verify", verify)
        assert _run(tmp_path / "all", base, text, calibration=texts).code == 0
    assert kept == [(0, 8 * 128 * 8)], "the tokens that verification compares"
    assert sum(devices.pins.values()) > 2
    with simulated_devices(1) as devices:
        devices.pinned.limit = 2**14
        full = _run(tmp_path / "full", base, text, calibration=texts)
    assert full.code == 1
    assert "the main memory is full, not the GPU" in full.err
    assert "repeated" not in full.err


# What fills the device first: pass 2 by its refit, pass 1 where it has a backward pass.
BLOCK_INFLUENCE = {"remove": 2, "criterion": {"kind": "block_influence"}}
FIRST_FULL = {
    "pass 2": {"depth": BLOCK_INFLUENCE},
    "pass 1": {"width": {"mlp": 0.5, "criterion": {"kind": "taylor"}}, "refit": False},
}


@pytest.mark.usefixtures("small_devices")
@pytest.mark.parametrize("step", FIRST_FULL)
def test_a_step_that_fills_the_device_is_repeated_with_half_the_batch(step: str, tmp_path: Path) -> None:
    """The result is that of the smaller batch from the start, to the bit. The report says what was repeated, that of a
    resumed run too, which repeats nothing.
    """
    base, text = save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt")
    texts = {"dataset": str(text), "samples": 8, "sequence_length": 128}
    limit = 64 << 30
    for name, batch_size in (("small", 4), ("full", 8), ("full", 8)):
        calibration = texts | {"batch_size": batch_size}
        with simulated_devices(1, memory=limit):
            done = _run(tmp_path / name, base, text, calibration=calibration, **FIRST_FULL[step])
        assert done.code == 0, done.err
        report = report_in(tmp_path / name)
        limit = min(limit, max(one["peak_device"] or 0 for one in report["steps"]))
    said = f"{step} ran out of memory on cuda:0 with batches of 8 windows; it was repeated with 4"
    assert [warning for warning in report["warnings"] if "ran out" in warning] == [said]
    assert report["provenance"]["batch_size"] == 4
    assert all(one["reused"] for one in report["steps"])
    small, full = (_weights(tmp_path / name) for name in ("small", "full"))
    assert all(torch.equal(small[name], full[name]) for name in small)


@pytest.mark.slow
@pytest.mark.usefixtures("small_devices")
def test_a_backward_pass_that_never_fits_is_left_out(tmp_path: Path) -> None:
    """Neurons are scored by ``share`` on a device that has no memory for one window's, and the report says so."""
    base = save_model(tmp_path / "dense", intermediate_size=384, max_position_embeddings=512, num_hidden_layers=2)
    text = write_text(tmp_path / "text.txt")
    texts = {"dataset": str(text), "samples": 2, "sequence_length": 512, "batch_size": 1, "self_generated": 1}
    limit = 64 << 30
    for kind in ("share", "share_taylor"):
        width = {"mlp": 0.5, "criterion": {"kind": kind}}
        with simulated_devices(1, memory=limit):
            done = _run(tmp_path / kind, base, text, calibration=texts, depth=None, width=width, refit=False)
        assert done.code == 0, done.err
        report = report_in(tmp_path / kind)
        limit = max(one["peak_device"] or 0 for one in report["steps"])
    said = "scored without gradients: pass 1: gradients, a single window at a time, on cuda:0: GPU 0 is out of memory"
    assert [warning for warning in report["warnings"] if warning.startswith(said)]
    share, both = (_weights(tmp_path / kind) for kind in ("share", "share_taylor"))
    assert all(torch.equal(share[name], both[name]) for name in share)


@pytest.mark.usefixtures("small_devices")
def test_a_resumed_run_keeps_its_batch_size(tmp_path: Path) -> None:
    """A run that began on a GPU and continues on the CPU computes with the numbers that were chosen for the GPU: of
    the held-out text too, of which more windows fit than of the calibration.
    """
    base, text = save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt")
    texts = {"dataset": str(text), "samples": 20, "sequence_length": 32}
    sections = {"calibration": texts, "evaluation": {"perplexity": texts | {"samples": 40}}}
    chosen = []
    with simulated_devices(1):
        assert _run(tmp_path / "out", base, text, **sections).code == 0
    for _ in range(2):
        again = report_in(tmp_path / "out")
        numbers = json.loads((tmp_path / "out/batch-sizes.json").read_text())
        chosen.append((again["provenance"]["batch_size"], numbers["held_out"]["number"]))
        assert _run(tmp_path / "out", base, text, **sections).code == 0
    assert chosen == [(32, 64), (32, 64)]
    assert all(one["reused"] for one in again["steps"])


@pytest.mark.usefixtures("small_devices")
def test_plain_forward_passes_leave_the_device_to_the_passes(tmp_path: Path) -> None:
    """The whole model that ``--measure-forward`` times is not on the GPU any more when a pass runs."""
    base, text = save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt")
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text)
    peaks = []
    for name, options in (("plain", []), ("measured", ["--measure-forward"])):
        with simulated_devices(1):
            done = command("run", recipe, "--output", tmp_path / name, *options)
        assert done.code == 0, done.err
        steps = {step["name"]: step["peak_device"] for step in report_in(tmp_path / name)["steps"]}
        peaks.append([steps["pass 1"], steps["pass 2"]])
    assert peaks[0] == peaks[1]


FAMILIES = {
    "llama": {"intermediate_size": 384},
    "gemma2": {"intermediate_size": 384, "head_dim": 16},  # attention scores are stored
    "mixtral": {"intermediate_size": 192},
}


@pytest.mark.usefixtures("small_devices")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_near_the_memory_that_a_run_takes(family: str, tmp_path: Path) -> None:
    """At least what the passes, held-out text included, take of the device, and at most twice as much."""
    fields = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3} | FAMILIES[family]
    base, text = save_model(tmp_path / "dense", family, **fields), write_text(tmp_path / "text.txt", 300)
    texts = {"dataset": str(text), "samples": 8, "sequence_length": 128, "batch_size": 4}
    with simulated_devices(1):
        done = _run(
            tmp_path / "out",
            base,
            text,
            model={"id": str(base), "device_map": "cpu"},
            calibration=texts,
            width={"mlp": 0.5},
            evaluation={"perplexity": texts},
        )
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    planned = DeviceMemory(**plan["devices"][0])
    steps = {step["name"]: step["peak_device"] for step in report_in(tmp_path / "out")["steps"]}
    measured = max(steps[name] for name in ("pass 1", "pass 2", "evaluation"))
    assert measured <= planned.working <= 2 * measured


@pytest.mark.slow
@pytest.mark.usefixtures("small_devices")
def test_a_gpu_of_a_third_of_the_model_runs_every_step(tmp_path: Path) -> None:
    """On 0.3 times the model's bytes scores, cut, refit, verification and the whole evaluation end as on the CPU."""
    base = save_model(tmp_path / "dense", num_hidden_layers=20, hidden_size=128, intermediate_size=256)
    text = write_text(tmp_path / "text.txt")
    size = (base / "model.safetensors").stat().st_size
    held_out = {"dataset": str(text), "samples": 4, "sequence_length": 32, "batch_size": 2}
    evaluation = every_measure(held_out) | {"limit": 2, "batch_size": 2}
    sections = {"calibration": held_out, "width": {"mlp": 0.5}, "depth": {"remove": 4}, "evaluation": evaluation}
    plain = _run(tmp_path / "cpu", base, text, **sections)
    assert plain.code == 0, plain.err
    parts = [part["name"] for part in json.loads((tmp_path / "cpu/plan.json").read_text())["work"]["parts"]]
    said = [plain.err.index(f" {name}") for name in parts]
    assert said == sorted(said), "the run reports its parts in the order that the time left is computed for"
    with simulated_devices(1, memory=int(0.3 * size)) as devices:
        done = _run(tmp_path / "gpu", base, text, **sections)
    assert done.code == 0, done.err
    found, on_cpu = report_in(tmp_path / "gpu"), report_in(tmp_path / "cpu")
    assert 0.15 * size < devices.peak["cuda:0"] <= 0.3 * size
    for part in ("layers", "perplexity", "generation", "tasks", "verification"):
        assert found[part] == on_cpu[part], part
    assert not [warning for warning in found["warnings"] if "ran out" in warning]
