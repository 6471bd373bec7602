"""A finished run is replaced only by a run that has a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Outcome, command, save_model, verify_here, write_recipe, write_text

from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.common.errors import DiskError, OutputError
from llmprune.results.run_folder.folder import RunFolder
from llmprune.results.run_folder.replacing import complete_swap, take_over

pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``base`` (a model), ``text.txt``, and ``out``, a finished run that removes two layers."""
    folder = tmp_path_factory.mktemp("workspace")
    write_text(folder / "text.txt")
    save_model(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        assert run(folder, folder).code == 0
    return folder


@pytest.fixture
def finished(workspace: Path, tmp_path: Path) -> Path:
    """Copy of the finished run."""
    shutil.copytree(workspace / "out", tmp_path / "out")
    return tmp_path / "out"


def run(workspace: Path, folder: Path, *options: str, text: Path | None = None, **sections: Any) -> Outcome:
    """Prune the workspace's model into ``out``; by default as the finished run did."""
    recipe = write_recipe(folder / "recipe.yaml", workspace / "base", text or workspace / "text.txt", **sections)
    return command("run", recipe, "--output", folder / "out", *options)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reused_steps(folder: Path) -> dict[str, bool]:
    """Return which steps of a finished run were reused, by name."""
    return {step["name"]: step["reused"] for step in json.loads((folder / "report.json").read_text())["steps"]}


def fail_in_pass_2(patch: pytest.MonkeyPatch) -> None:
    """Raise DiskError when pass 2 writes its second layer."""
    write = CheckpointWriter.write_layer

    def write_or_fail(writer: CheckpointWriter, index: int, tensors: Any) -> None:
        if index:
            raise DiskError("the disk is full")
        write(writer, index, tensors)

    patch.setattr(CheckpointWriter, "write_layer", write_or_fail)


def test_finished_run_of_another_recipe_is_refused(workspace: Path, tmp_path: Path, finished: Path) -> None:
    """The error names the differences, the model with its size, and both remedies."""
    before = contents(finished)
    outcome = run(workspace, tmp_path, depth={"remove": 1})
    assert outcome.code == 2
    for said in (
        "another recipe (depth.remove: 2 in the folder, 1 in this recipe)",
        f"{finished / 'model'} (",
        " KB)",
        "--output",
        "--fresh",
    ):
        assert said in outcome.err
    assert contents(finished) == before


def test_other_text_is_another_recipe(workspace: Path, tmp_path: Path, finished: Path) -> None:
    """Another text is refused; a copy of the same text is not."""
    other, copy = write_text(tmp_path / "other.txt", paragraphs=90), write_text(tmp_path / "copy.txt")
    before = contents(finished)
    outcome = run(workspace, tmp_path, text=other)
    assert (outcome.code, "calibration.dataset: " in outcome.err) == (2, True)
    assert contents(finished) == before
    assert run(workspace, tmp_path, text=copy).code == 0
    assert contents(finished)["model/model.safetensors"] == before["model/model.safetensors"]


def test_other_generated_text_is_another_recipe(workspace: Path, tmp_path: Path, finished: Path) -> None:
    """A recipe that reads the same text and has the model write more of it does not replace the finished run."""
    before = contents(finished)
    text = {"dataset": str(workspace / "text.txt"), "samples": 6, "sequence_length": 32, "self_generated": 2}
    outcome = run(workspace, tmp_path, calibration=text)
    assert outcome.code == 2
    assert "calibration.self_generated: 0 in the folder, 2 in this recipe" in outcome.err
    assert contents(finished) == before


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
    """With --fresh, a recipe that cannot be run changes nothing."""
    before = contents(finished)
    assert run(workspace, tmp_path, "--fresh", **wrong).code in (1, 2)
    assert contents(finished) == before
    assert not (finished / "next.partial").exists()


def test_fresh_run_that_fails_leaves_the_finished_one_and_continues(
    workspace: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error in pass 2 the old run is complete; the next start continues the new run, which replaces it."""
    before = contents(finished)
    with monkeypatch.context() as patch:
        fail_in_pass_2(patch)
        assert run(workspace, tmp_path, "--fresh", depth={"remove": 1}).code == 1
    assert {name: text for name, text in contents(finished).items() if "next.partial" not in name} == before
    assert run(workspace, tmp_path, depth={"remove": 1}).code == 0
    assert reused_steps(finished)["pass 1"], "pass 1 is not repeated"
    after = contents(finished)
    assert after.keys() == before.keys()
    assert after["model/model.safetensors"] != before["model/model.safetensors"]
    assert "remove: 1" in (finished / "recipe.yaml").read_text()


def test_own_recipe_of_the_finished_run_is_not_disturbed_by_an_unfinished_replacement(
    workspace: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its products are reused, and a warning names the folder of the other run."""
    with monkeypatch.context() as patch:
        fail_in_pass_2(patch)
        assert run(workspace, tmp_path, "--fresh", depth={"remove": 1}).code == 1
    assert run(workspace, tmp_path).code == 0
    steps = reused_steps(finished)
    assert steps
    assert all(steps.values()), "no step is repeated"
    assert str(finished / "next.partial") in caplog.text


def test_other_code_replaces_only_with_a_model(
    workspace: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of another version are made again, and replace the old ones once the new model is verified."""
    journal = json.loads((finished / "run.json").read_text())
    products = {name: product | {"fingerprint": "of other code"} for name, product in journal["products"].items()}
    (finished / "run.json").write_text(json.dumps(journal | {"origin": "other code", "products": products}))
    before = contents(finished)
    with monkeypatch.context() as patch:
        fail_in_pass_2(patch)
        assert run(workspace, tmp_path).code == 1
    assert {name: text for name, text in contents(finished).items() if "next.partial" not in name} == before
    assert run(workspace, tmp_path).code == 0
    assert contents(finished).keys() == before.keys()


class _Killed(BaseException):
    pass


def _kill_at(count: int, patch: pytest.MonkeyPatch) -> None:
    """Raise ``_Killed`` at this change to the file system, counted from 0."""
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
    """Killed at any change, the next start has the complete new run and the user's file."""
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
    """A folder whose journal is in the middle of the swap is recognised; a folder with other files is not."""
    (tmp_path / "next.ready" / "model").mkdir(parents=True)
    (tmp_path / "next.ready" / "run.json").write_text('{"format": 2, "recipe": {}, "origin": "", "products": {}}')
    for name in ("reevaluate", "push"):
        assert "has no report.json; the run is not finished" in command(name, tmp_path).err
    assert (tmp_path / "model").is_dir()
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "run.json").unlink()
    (tmp_path / "thesis.tex").touch()
    for name in ("reevaluate", "push"):
        assert "is not the folder of a run; give the folder that llmprune run wrote to" in command(name, tmp_path).err
    with pytest.raises(OutputError, match="not the folder of a run"):
        RunFolder.open(tmp_path)
