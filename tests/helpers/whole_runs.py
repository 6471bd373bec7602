"""Whole runs on the devices that there are, GPUs or simulated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.commands import TASKS, Outcome, command, report_in, verify_here, write_recipe


def every_measure(held_out: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation section with every measure, each as short as it can be."""
    return {
        "perplexity": held_out,
        "generation": {"prompts": "held_out", "samples": 2, "prompt_tokens": 8, "new_tokens": 8},
        "speed": {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1},
        "tasks": ["llmprune_agreement"],
        "include_path": str(TASKS),
    }


def run_with_every_measure(root: Path, name: str, *, device_map: Any, here: bool = True) -> dict[str, Any]:
    """Run a recipe with heads, 2:4 sparsity and every measure into ``root/name``, and return its report.

    ``root`` has the model ``dense`` and ``text.txt``. The batch sizes are named, because ``auto`` depends on the
    device. ``here``: verify in this process, which has the simulated devices.
    """
    text = root / "text.txt"
    held_out = {"dataset": str(text), "samples": 4, "sequence_length": 32, "batch_size": 2}
    recipe = write_recipe(
        root / f"{name}.yaml",
        root / "dense",
        text,
        model={"id": str(root / "dense"), "device_map": device_map},
        calibration={"dataset": str(text), "samples": 6, "sequence_length": 32, "batch_size": 4},
        width={"neurons": 64, "heads": 1},
        sparsity={"pattern": "2:4"},
        refit={},
        evaluation=every_measure(held_out) | {"limit": 4},
    )
    with pytest.MonkeyPatch.context() as patch:
        if here:
            verify_here(patch)
        done: Outcome = command("run", recipe, "--output", root / name, "--measure-forward", "--calibration-check")
    assert done.code == 0, done.err
    return report_in(root / name)
