"""Several processes under torchrun end where one process ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import TASKS, save_model, write_recipe, write_text


def _launch(folder: Path, output: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "llmprune", "run", "recipe.yaml", "--output", output]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / f"home-{output}")},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recipe, run by one process into ``one`` and by two into ``two``."""
    root = tmp_path_factory.mktemp("processes")
    tasks = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 5}
    sections = {"evaluation": tasks, "sparsity": {"pattern": "4:8"}, "refit": {"up": True}}
    write_recipe(root / "recipe.yaml", save_model(root / "dense"), write_text(root / "text.txt"), **sections)
    for output, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--nproc-per-node", "2"))):
        done = _launch(root, output, *launcher)
        assert done.returncode == 0, done.stderr[-2000:]
        (root / f"{output}.log").write_text(done.stdout + done.stderr)
    return root


def test_two_processes_equal_one(folder: Path) -> None:
    """The same layers and neurons stay, and the weights differ by float32 rounding only; but where two weights of a row
    are as good, rounding decides which goes, and what comes behind that row sees it.
    """
    cuts = [load_file(folder / name / "cut.safetensors") for name in ("one", "two")]
    assert (folder / "one/cut.json").read_text() == (folder / "two/cut.json").read_text()
    assert cuts[0].keys() == cuts[1].keys()
    assert all(torch.equal(cuts[0][key], cuts[1][key]) for key in cuts[0])
    one, two = (load_file(folder / name / "model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        rows, others = (each.reshape(each.shape[0], -1) for each in (tensor, two[key]))
        apart = (rows - others).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-30)
        assert float(apart.median()) <= 1e-3, key


def test_number_of_processes_is_said(folder: Path) -> None:
    """Under a launcher the run says how many processes walk; alone it need not."""
    assert "walking in 2 processes on cpu" in (folder / "two.log").read_text()
    assert "walking in" not in (folder / "one.log").read_text()
    report = json.loads((folder / "two/report.json").read_text())
    assert report["provenance"]["processes"] == 2


def test_up_projections_are_judged_together(folder: Path) -> None:
    """The windows held out are shared too, and the same steps are taken."""
    found = [json.loads((folder / name / "report.json").read_text())["layers"] for name in ("one", "two")]
    one, two = ([layer["up_held_out"] for layer in layers if not layer["removed"]] for layers in found)
    assert any(one)
    assert two == pytest.approx(one, abs=1e-4)


def test_processes_share_the_samples(folder: Path) -> None:
    """Each process answers some of five documents; together they are those that one process answers, in order."""
    for side in ("dense_tasks", "pruned_tasks"):
        one, two = (
            json.loads((folder / name / "evaluation.json").read_text())[side]["tasks"][0] for name in ("one", "two")
        )
        assert [sample["doc_id"] for sample in two["samples"]] == list(range(5))
        for kept in ("doc_hash", "prompt_hash", "value"):
            assert [sample[kept] for sample in one["samples"]] == [sample[kept] for sample in two["samples"]]
        assert one["value"] == two["value"]


def test_launcher_that_starts_too_few(folder: Path) -> None:
    """accelerate launch --cpu --num_processes 2 starts one process in silence; the run says that it is one."""
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    done = _launch(folder, "one", *launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "walking in 1 process on cpu" in done.stderr
