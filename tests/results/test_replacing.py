"""A finished run goes only when another one that has a model takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Outcome, command, forbid_weights, reused_steps, write_recipe, write_text

from llmprune.checkpoint.saving import CheckpointWriter
from llmprune.common.errors import DiskError, OutputError
from llmprune.pipeline import inputs
from llmprune.results.replacing import complete_swap, take_over
from llmprune.results.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("in_one_process")


def run(workspace: Path, folder: Path, *options: str, text: Path | None = None, **sections: Any) -> Outcome:
    """Prune the model of the workspace into ``out``; by default as the finished run did."""
    recipe = write_recipe(folder / "recipe.yaml", workspace / "base", text or workspace / "text.txt", **sections)
    return command("run", recipe, "--output", folder / "out", *options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_in_pass_2(patch: pytest.MonkeyPatch) -> None:
    """Let the disk fill up while pass 2 writes its second layer."""
    write = CheckpointWriter.write_layer

    def write_or_fail(writer: CheckpointWriter, index: int, tensors: Any) -> None:
        if index:
            raise DiskError("the disk is full")
        write(writer, index, tensors)

    patch.setattr(CheckpointWriter, "write_layer", write_or_fail)


def test_finished_run_of_another_recipe_is_refused(workspace: Path, tmp_path: Path, finished: Path) -> None:
    """The sentence names what differs, the model that would go with its size, and both remedies."""
    before = contents(finished)
    outcome = run(workspace, tmp_path, depth={"remove": 1})
    assert outcome.code == 2
    for said in (
        "another recipe (depth.remove: 2 there, 1 here)",
        f"{finished / 'model'} (",
        " KB)",
        "--output",
        "--fresh",
    ):
        assert said in outcome.err
    assert contents(finished) == before


def test_other_text_is_another_recipe(workspace: Path, tmp_path: Path, finished: Path) -> None:
    """Text of another place counts where its tokens differ, and a copy of the same text does not."""
    other, copy = write_text(tmp_path / "other.txt", paragraphs=90), write_text(tmp_path / "copy.txt")
    before = contents(finished)
    outcome = run(workspace, tmp_path, text=other)
    assert (outcome.code, "calibration.dataset: " in outcome.err) == (2, True)
    assert contents(finished) == before
    assert run(workspace, tmp_path, text=copy).code == 0
    assert contents(finished)["model/model.safetensors"] == before["model/model.safetensors"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": {"remove": 99}},
        {"calibration": {"dataset": "/nowhere.txt"}},
        {"evaluation": {"perplexity": {"dataset": "/nowhere.txt"}}},
    ],
)
def test_fresh_run_that_is_refused_leaves_the_finished_one(
    wrong: dict[str, Any], workspace: Path, tmp_path: Path, finished: Path
) -> None:
    """With --fresh a recipe that cannot be run changes nothing."""
    before = contents(finished)
    assert run(workspace, tmp_path, "--fresh", **wrong).code in (1, 2)
    assert contents(finished) == before
    assert not (finished / "next.partial").exists()


def test_fresh_run_that_fails_leaves_the_finished_one_and_continues(
    workspace: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error in pass 2 the old run is whole; without --fresh the new one continues and takes its place."""
    before = contents(finished)
    with monkeypatch.context() as patch:
        fail_in_pass_2(patch)
        assert run(workspace, tmp_path, "--fresh", depth={"remove": 1}).code == 1
    assert {name: text for name, text in contents(finished).items() if "next.partial" not in name} == before
    assert run(workspace, tmp_path, depth={"remove": 1}).code == 0
    assert reused_steps(finished)["pass 1"]
    after = contents(finished)
    assert after.keys() == before.keys()
    assert after["model/model.safetensors"] != before["model/model.safetensors"]
    assert "remove: 1" in (finished / "recipe.yaml").read_text()


def test_own_recipe_of_the_finished_run_is_not_disturbed_by_an_unfinished_replacement(
    workspace: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It finds its products, and a warning says where the other run's partial products are."""
    with monkeypatch.context() as patch:
        fail_in_pass_2(patch)
        assert run(workspace, tmp_path, "--fresh", depth={"remove": 1}).code == 1
    forbid_weights(monkeypatch)
    assert run(workspace, tmp_path).code == 0
    assert str(finished / "next.partial") in caplog.text


def test_other_code_replaces_only_with_a_model(
    workspace: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same recipe under another version makes its products anew, beside the old ones until the model is there."""
    before = contents(finished)
    monkeypatch.setattr(inputs, "code_fingerprint", lambda: "another")
    with monkeypatch.context() as patch:
        fail_in_pass_2(patch)
        assert run(workspace, tmp_path).code == 1
    assert {name: text for name, text in contents(finished).items() if "next.partial" not in name} == before
    assert run(workspace, tmp_path).code == 0
    assert contents(finished).keys() == before.keys()


class _Killed(BaseException):
    pass


def _kill_at(count: int, patch: pytest.MonkeyPatch) -> None:
    """End with an error of its own at one of the changes to the file system."""
    left = [count]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return change(*arguments, **options)

        return do

    for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")):
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("count", range(12))
def test_killed_swap_is_completed(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the instant of a kill, the next start has the whole new run, and the user's own file."""
    products = ("model", "cut.json", "scores.safetensors", "run.json")
    for place, made in (
        (tmp_path, ("model", "cut.json", "scores.safetensors", "run.json")),
        (tmp_path / "next.partial", ("model", "cut.json", "run.json")),
    ):
        (place / "model").mkdir(parents=True)
        for name in made:
            (place / name / "config.json" if name == "model" else place / name).write_text(place.name)
    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        _kill_at(count, patch)
        with suppress(_Killed):
            take_over(tmp_path, products)
    if (tmp_path / "next.partial").exists():
        take_over(tmp_path, products)
    complete_swap(tmp_path, products)
    assert contents(tmp_path) == dict.fromkeys(("model/config.json", "cut.json", "run.json"), b"next.partial") | {
        "notes.txt": b"mine"
    }


def test_folder_with_a_begun_swap_is_a_run(tmp_path: Path) -> None:
    """A kill that left no journal in the folder itself does not make it a stranger's."""
    (tmp_path / "next.ready" / "model").mkdir(parents=True)
    (tmp_path / "next.ready" / "run.json").write_text('{"format": 2, "recipe": {}, "origin": "", "products": {}}')
    for name in ("reevaluate", "push"):
        assert "has no report that can be read" in command(name, tmp_path).err
    assert (tmp_path / "model").is_dir()
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "run.json").unlink()
    (tmp_path / "thesis.tex").touch()
    for name in ("reevaluate", "push"):
        assert "is no llmprune run; give the folder that llmprune run wrote to" in command(name, tmp_path).err
    with pytest.raises(OutputError, match="no llmprune run"):
        RunFolder.open(tmp_path)
