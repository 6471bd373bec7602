"""A disk that is just large enough: files that the run has written do not change its decisions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.commands import LAYERS, Outcome, command, states, verify_here, write_recipe

from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.common.files import folder_size, require_space
from llmprune.layerwise.backward import LayerwiseBackward
from llmprune.layerwise.forward import LayerwiseForward

TAYLOR = {"mlp": 0.5, "criterion": {"kind": "taylor"}}


pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.fixture(scope="module")
def whole(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole run on a large disk."""
    folder: Path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        assert run(workspace, folder).code == 0
    return folder / "out"


def run(workspace: Path, folder: Path, *options: str) -> Outcome:
    """Prune in width by gradients, into ``out``."""
    recipe = write_recipe(folder / "recipe.yaml", workspace / "base", workspace / "text.txt", depth=None, width=TAYLOR)
    return command("run", recipe, "--output", folder / "out", *options)


def shrink_disk(patch: pytest.MonkeyPatch, folder: Path, size: int) -> None:
    """Give the disk ``size`` bytes, less those of the files in a folder."""

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(total=size, used=folder_size(folder), free=size - folder_size(folder))

    patch.setattr(shutil, "disk_usage", usage)


def least_disk(whole: Path) -> int:
    """Bytes of the smallest disk on which a run begins: the hidden-state cache takes at most half of it."""
    plan = json.loads((whole / "plan.json").read_text())
    cache = LAYERS * 6 * 32 * 64 * 4
    return max(2 * cache, 2 * plan["disk"] + 2 * plan["memory"]["hidden_states"] + cache)


@pytest.mark.parametrize("stop", ["gradients", "layer"])
def test_interrupted_run_on_a_small_disk_equals_an_uninterrupted_one(
    stop: str, workspace: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in pass 1 or in pass 2, it continues with what pass 1 left, and ends with the same weights."""
    shrink_disk(monkeypatch, tmp_path / "out", least_disk(whole))
    with monkeypatch.context() as patch:
        if stop == "gradients":
            patch.setattr(LayerwiseBackward, "__init__", _stopped)
        else:
            patch.setattr(CheckpointWriter, "write_layer", _stopped)
        assert run(workspace, tmp_path, *(["--calibration-check"] if stop == "layer" else [])).code == 130
    kept = [path.name for path in (tmp_path / "out" / "dense.partial").glob("*.safetensors")]
    # a finished pass 1 leaves those of all windows for pass 2, and nothing of their halves
    assert len(kept) == (LAYERS if stop == "layer" else 0)
    with monkeypatch.context() as patch:
        if stop == "layer":  # the dense model runs for the first kind of layer only
            passed = count_passes(patch)
        outcome = run(workspace, tmp_path)
    assert outcome.code == 0, outcome.err
    assert stop != "layer" or passed == [0]
    assert states(tmp_path / "out" / "model") == states(whole / "model")


def _stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def count_passes(patch: pytest.MonkeyPatch) -> list[int]:
    """Record the layers that hidden states pass through from now on."""
    passed: list[int] = []
    pass_through = LayerwiseForward.pass_through
    patch.setattr(
        LayerwiseForward, "pass_through", lambda self, *args: (passed.append(args[0]), pass_through(self, *args))
    )
    return passed


def test_what_is_written_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that continues needs room only for what is not there yet."""
    (tmp_path / "part").write_bytes(bytes(600))
    shrink_disk(monkeypatch, tmp_path, 1000)
    require_space(tmp_path, 900, written=600)
    with pytest.raises(Exception, match="needs 900 B on disk"):
        require_space(tmp_path, 900)


def test_what_fresh_clears_counts(
    workspace: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of an unfinished run go when a new one begins; a finished one stays meanwhile."""
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "model").rename(tmp_path / "out" / "model.partial")
    shrink_disk(monkeypatch, tmp_path / "out", least_disk(whole))
    assert run(workspace, tmp_path, "--fresh").code == 0
    refused = run(workspace, tmp_path, "--fresh")
    assert (refused.code, "on disk" in refused.err) == (1, True)
