"""A disk that is just large enough: what the run itself has written does not change what it decides."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.commands import LAYERS, Outcome, command, save_model, states, verify_here, write_recipe, write_text

from llmprune.checkpoint.saving import CheckpointWriter
from llmprune.common.files import folder_size, require_space
from llmprune.layerwise.forward import LayerwiseForward

TAYLOR = {"mlp": 0.5, "criterion": {"kind": "taylor"}}


@pytest.fixture(autouse=True)
def _in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_here(monkeypatch)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` (a model), ``text.txt``, and ``out``, a whole run on a large disk."""
    folder = tmp_path_factory.mktemp("room")
    write_text(folder / "text.txt")
    save_model(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        assert run(folder, folder).code == 0
    return folder


def run(room: Path, folder: Path, *options: str) -> Outcome:
    """Prune in width by gradients, into ``out``."""
    recipe = write_recipe(folder / "recipe.yaml", room / "base", room / "text.txt", depth=None, width=TAYLOR)
    return command("run", recipe, "--output", folder / "out", *options)


def shrink_disk(patch: pytest.MonkeyPatch, folder: Path, size: int) -> None:
    """Let the disk have so many bytes, less those of the files in a folder."""

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(total=size, used=folder_size(folder), free=size - folder_size(folder))

    patch.setattr(shutil, "disk_usage", usage)


def least_disk(room: Path, folder: Path, patch: pytest.MonkeyPatch) -> int:
    """The smallest disk on which a run begins: the hidden states after every layer take half of it at most."""
    asked: list[int] = []
    patch.setattr("llmprune.pipeline.run.require_space", lambda path, needed, **_: asked.append(needed))
    patch.setattr("llmprune.pipeline.run.RunFolder.open", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    run(room, folder)
    trail = LAYERS * 6 * 32 * 64 * 4
    return max(2 * trail, asked[0] + trail)


@pytest.mark.parametrize("stop", ["gradients", "layer"])
def test_interrupted_run_on_a_small_disk_equals_an_uninterrupted_one(
    stop: str, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in pass 1 or in pass 2, it continues with what pass 1 left, and ends with the same weights."""
    with monkeypatch.context() as patch:
        size = least_disk(room, tmp_path, patch)
    shrink_disk(monkeypatch, tmp_path / "out", size)
    with monkeypatch.context() as patch:
        if stop == "gradients":
            patch.setattr("llmprune.score.forward_pass.LayerwiseBackward", _stopped)
        else:
            patch.setattr(CheckpointWriter, "write_layer", _stopped)
        assert run(room, tmp_path, *(["--calibration-check"] if stop == "layer" else [])).code == 130
    kept = [path.name for path in (tmp_path / "out" / "dense.partial").glob("*.safetensors")]
    assert len(kept) == LAYERS, "of all windows, and nothing of their halves"
    with monkeypatch.context() as patch:
        if stop == "layer":  # the dense model runs for the first kind of layer only
            passed = count_passes(patch)
        outcome = run(room, tmp_path)
    assert outcome.code == 0, outcome.err
    assert stop != "layer" or passed == [0]
    assert states(tmp_path / "out" / "model") == states(room / "out" / "model")


def _stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def count_passes(patch: pytest.MonkeyPatch) -> list[int]:
    """The layers that a stream passes through, from now on."""
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


def test_what_fresh_clears_counts(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of an unfinished run go when a new one begins; a finished one stays meanwhile."""
    with monkeypatch.context() as patch:
        size = least_disk(room, tmp_path, patch)
    shutil.copytree(room / "out", tmp_path / "out")
    (tmp_path / "out" / "model").rename(tmp_path / "out" / "model.partial")
    shrink_disk(monkeypatch, tmp_path / "out", size)
    assert run(room, tmp_path, "--fresh").code == 0
    refused = run(room, tmp_path, "--fresh")
    assert (refused.code, "on disk" in refused.err) == (1, True)
