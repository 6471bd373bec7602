"""``llmprune run`` on several GPUs: the processes that it starts, on a machine that only says that it has GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import command, report_in

TWO_GPUS = """
import torch
from llmprune.cli.main import main
torch.cuda.device_count = lambda: 2
main()
"""


@pytest.mark.slow
def test_a_run_uses_every_gpu(workspace: Path, tmp_path: Path) -> None:
    """One command runs in two processes, prints as one, and ends with the code of the run; a fresh one verifies."""
    progress = tmp_path / "progress.json"
    own = {
        "LLMPRUNE_PROGRESS": str(progress),
        "HF_HOME": str(tmp_path / "home"),
        "CUDA_VISIBLE_DEVICES": "4,6",
    }
    program = (sys.executable, "-c", TWO_GPUS, "run", "recipe.yaml", "--output", str(tmp_path / "out"))
    done = subprocess.run(
        (*program, "--set", "calibration.samples=5", "--set", "devices=[1, 0]"),
        cwd=workspace, env=os.environ | own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    provenance = report_in(tmp_path / "out")["provenance"]
    assert (provenance["processes"], provenance["calibration_tokens"]) == (2, 5 * 32)
    assert done.stderr.count("running in 2 processes") == 1
    assert "devices:" not in done.stderr
    assert done.stdout.count("MLP width") == 1
    assert progress.is_file()


def test_a_program_that_calls_the_command_line_is_not_started_twice(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own arguments say nothing about this command: the run is in its process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    outcome = command("run", workspace / "recipe.yaml", "--output", tmp_path, "--set", "depth.remove=9")
    assert outcome.code == 2
    assert outcome.err.count("at least one must stay") == 1


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["plan", "run"])
def test_absent_devices_are_refused(
    name: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, with what is there; a plan still shows the sizes."""
    monkeypatch.chdir(tmp_path)
    outcome = command(name, workspace / "recipe.yaml", "--set", "devices=[0, 7]")
    assert outcome.code == 2
    assert "devices: GPUs 0, 7 asked, and torch sees no GPU" in outcome.err
    assert ("KV cache" in outcome.out) == (name == "plan")
    assert not any(tmp_path.iterdir())
