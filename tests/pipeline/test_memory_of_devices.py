"""Runs on simulated GPUs of little memory: what the plan says of them, and retries where it does not suffice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Outcome, command, perplexity_of, report_in, save_model, verify_here, write_recipe, write_text
from helpers.devices import simulated_devices
from safetensors.torch import load_file
from transformers import modeling_utils


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
def test_a_step_that_fills_the_device_is_repeated_with_half_the_batch(tmp_path: Path) -> None:
    """The result is that of the smaller batch from the start, to the bit; the report says what was repeated, also that
    of a resumed run.
    """
    base, text = save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt")
    texts = {"dataset": str(text), "samples": 8, "sequence_length": 128}
    limit = 64 << 30
    for name, batch_size in (("small", 4), ("full", 8)):
        with simulated_devices(1, memory=limit) as devices:
            done = _run(tmp_path / name, base, text, calibration=texts | {"batch_size": batch_size})
        assert done.code == 0, done.err
        limit = devices.peak["cuda:0"]
    said = "pass 2 ran out of memory on cuda:0 with batches of 8 windows; it was repeated with 4"
    assert said in report_in(tmp_path / "full")["warnings"]
    assert said in done.err
    small, full = (_weights(tmp_path / name) for name in ("small", "full"))
    assert all(torch.equal(small[name], full[name]) for name in small)
