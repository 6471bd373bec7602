"""Recoveries by two processes, which share the model by FSDP2, give the weights of one up to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recovering import save_pair
from helpers.recovering_in_two import CASES
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with pairs of models, and in ``two`` what two processes made of them."""
    folder = tmp_path_factory.mktemp("processes")
    save_pair(folder / "llama", "llama")
    save_pair(folder / "zeros", "llama", zeros=True)
    save_pair(folder / "bfloat16", "qwen2", dtype=torch.bfloat16)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.recovering_in_two", str(folder)],
        cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def saved(root: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights that two processes saved."""
    (file,) = (root / "two" / name).glob("*/model.safetensors")
    return load_file(file)


def progress(root: Path, name: str) -> dict[str, Any]:
    """Return the progress of the training of two processes."""
    found: dict[str, Any] = json.loads((root / "two" / name / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", ["full", "lora", "zeros", "bfloat16", "hidden states"])
def test_two_processes_equal_one(root: Path, tmp_path: Path, name: str) -> None:
    """Weights, and divergence and training loss at each check, are those of one process up to rounding."""
    one, two = CASES[name].run(root, tmp_path), progress(root, name)
    assert one.folder is not None
    assert two["best_step"] == one.progress.best_step > 0
    for check, other in zip(one.progress.checks, two["checks"], strict=True):
        assert other["divergence"] == pytest.approx(check.divergence, rel=1e-3)
        assert other["loss"] is None if check.loss is None else other["loss"] == pytest.approx(check.loss, rel=1e-3)
    weights, others = load_file(one.folder / "model.safetensors"), saved(root, name)
    before = load_file(root / CASES[name].pair / "repaired" / "model.safetensors")
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        moved = (weight - before[key]).float().norm()
        assert float((weight - others[key]).float().norm()) <= 0.02 * float(moved), key


def test_a_killed_training_of_two_goes_on_to_the_same_bytes(root: Path) -> None:
    """Each process continues with its own part of weights and optimiser."""
    whole, resumed = saved(root, "full"), saved(root, "killed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", ["zeros", "lora"])
def test_zeros_stay_with_two(root: Path, name: str) -> None:
    """Weights of sparse matrices that are zero before the training are zero in the saved file, and others are not."""
    before, after = load_file(root / "zeros" / "repaired" / "model.safetensors"), saved(root, name)
    sparse = [key for key in before if "mlp" in key]
    assert sparse
    assert all(torch.equal(before[key] == 0, after[key] == 0) for key in sparse)


def test_a_setback_of_two_goes_back_in_both(root: Path) -> None:
    """The parts of both are the last good ones again, and the training goes on to measurements that are finite."""
    found = progress(root, "setback")
    assert found["setbacks"] > 0
    assert all(torch.tensor(list(check["divergence"].values())).isfinite().all() for check in found["checks"])
