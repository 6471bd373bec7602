"""Output folders that cannot be used, and disks that are too small."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import command, prune_workspace, states
from helpers.damaged_models import (
    assert_refused,
)

from llmprune.results.run_folder.folder import RunFolder

pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.mark.usefixtures("no_weights")
def test_output_that_cannot_be_used(workspace: Path, tmp_path: Path) -> None:
    """A file, a folder of other things, and a path through a file are refused and left as they are."""
    (tmp_path / "out").write_text("mine")
    assert_refused(prune_workspace(workspace, tmp_path), 2, "out is a file", "give a folder")
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for options in ([], ["--fresh"]):
        outcome = command("run", tmp_path / "recipe.yaml", "--output", tmp_path / "out", *options)
        assert_refused(outcome, 2, "not empty and is not the folder of a run", "new or empty folder")
    assert states(tmp_path / "out") == {"thesis.tex": b"mine"}
    through = tmp_path / "out" / "thesis.tex" / "deeper"
    assert_refused(command("run", tmp_path / "recipe.yaml", "--output", through), 2, "cannot be used", "another --out")
    long = tmp_path / ("x" * 300)
    assert_refused(command("run", tmp_path / "recipe.yaml", "--output", long), 2, "cannot be used", "File name too")


def test_output_that_holds_the_model(workspace: Path, tmp_path: Path, finished: Path) -> None:
    """A run that would replace the model it reads is refused, and so is starting it afresh."""
    model = states(finished / "model")
    assert_refused(
        prune_workspace(workspace, tmp_path, finished / "model", depth={"remove": 1}, width=None),
        2,
        "would replace it",
        "another --output",
    )
    again = command("run", tmp_path / "recipe.yaml", "--output", finished, "--fresh")
    assert_refused(again, 2, "would replace it")
    assert states(finished / "model") == model


def test_output_in_use(workspace: Path, tmp_path: Path) -> None:
    """A folder that another run holds is refused, and free again when that run ends."""

    other = RunFolder.open(tmp_path / "out")
    assert_refused(prune_workspace(workspace, tmp_path), 2, "another run is using", "wait for it")
    other.close()
    assert prune_workspace(workspace, tmp_path).code == 0


@pytest.mark.usefixtures("no_weights")
def test_no_space_is_known_beforehand(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small for the result is refused before anything is made."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))
    assert_refused(
        prune_workspace(workspace, tmp_path),
        1,
        "the result needs",
        "1 KB free",
        "free some space, or choose another --output",
    )
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails in the middle of pass 2 is one error; when there is room again, the run continues."""
    from safetensors import torch as saver

    original, written = saver.save_file, []

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        if "layer-00001" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(str(path))
        original(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_file", save)
        outcome = prune_workspace(workspace, tmp_path)
    assert any("layer-00000" in path for path in written), "the write failed in the middle"
    assert_refused(outcome, 1, "No space left on device", "free some space", "run again")
    assert not (tmp_path / "out" / "model").exists()
    assert not list((tmp_path / "out").rglob("config.json"))
    assert prune_workspace(workspace, tmp_path).code == 0
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert {step["name"] for step in steps if step["reused"]} == {"pass 1", "ablation"}
    assert not (tmp_path / "out" / "model.partial").exists()
