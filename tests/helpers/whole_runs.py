"""Whole runs on the devices that there are, GPUs or simulated ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.commands import TASKS, Outcome, command, write_recipe


def run_with_every_measure(folder: Path, base: Path, text: Path, device_map: str) -> dict[str, Any]:
    """Run a recipe with heads, 2:4 sparsity and every measure on this device map, and return its report."""
    held_out = {"dataset": str(text), "samples": 4, "sequence_length": 32}
    recipe = write_recipe(
        folder.with_suffix(".yaml"),
        base,
        text,
        model={"id": str(base), "device_map": device_map},
        width={"neurons": 64, "heads": 1},
        sparsity={"pattern": "2:4"},
        refit={},
        evaluation={
            "perplexity": held_out,
            "generation": {"samples": 2, "prompt_tokens": 8, "new_tokens": 8},
            "speed": {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1},
            "tasks": ["llmprune_agreement"],
            "include_path": str(TASKS),
            "limit": 4,
        },
    )
    done: Outcome = command("run", recipe, "--output", folder, "--measure-forward", "--calibration-check")
    assert done.code == 0, done.err
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
