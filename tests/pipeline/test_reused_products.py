"""Runs that begin with products of another: another size from the same scores, and further tasks of the same model."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import (
    TASKS,
    command,
    perplexity_of,
    report_in,
    reused_steps,
    save_model,
    states,
    verify_here,
    write_recipe,
    write_text,
)
from safetensors.torch import load_file

from llmprune.results.run_folder.earlier_products import take_scores
from llmprune.service.jobs.follow_ups.recipes import overrides_of
from llmprune.service.jobs.follow_ups.work import Recover, Sparsify, Work
from llmprune.service.jobs.job import Job
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.settings import Settings
from llmprune.service.supervisor.follow_up_commands import follow_up_arguments

MODEL = "model/model.safetensors"
PARENT, SPARSE, TRAINED = "a" * 12, "b" * 12, "c" * 12
TASK = {"include_path": str(TASKS), "limit": 4}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a model, and the finished run ``parent`` that removes one layer."""
    folder = tmp_path_factory.mktemp("reused")
    save_model(folder / "base")
    write_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        done = command("run", recipe(folder, 1), "--output", settings_of(folder).run_folder(PARENT))
    assert done.code == 0, done.err
    (folder / "parent").symlink_to(settings_of(folder).run_folder(PARENT))
    return folder


def settings_of(folder: Path) -> Settings:
    """Return the settings of a service whose data folder has the workspace's run as a job."""
    return Settings(data_dir=folder / "data", allow_roots=(folder,), allow_tasks=(TASKS,))


def follow_up(folder: Path, parent: Job, *, work: Work, job: str) -> Job:
    """Run a follow-up as the service does, without a process of its own, and return its job."""
    settings = settings_of(folder)
    admitted = admit(parent.recipe, overrides_of(parent, work, settings=settings), settings=settings)
    made = Job.model_construct(id=job, recipe=parent.recipe, overrides=tuple(admitted.overrides), work=work)
    home = settings.folder(job)
    home.mkdir(parents=True)
    (home / "recipe.yaml").write_text(made.recipe)
    done = command(*follow_up_arguments(made, work, folder=home, parent=settings.run_folder(parent.id)))
    assert done.code == 0, done.err
    return made


def recipe(folder: Path, layers: int) -> Path:
    """Write a recipe that removes layers, a third of the neurons, and measures perplexity."""
    measured = perplexity_of(folder / "text.txt", **TASK)
    path = folder / f"remove-{layers}.yaml"
    return write_recipe(path, folder / "base", folder / "text.txt", depth={"remove": layers}, evaluation=measured)


def test_another_size_from_the_same_scores(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is that of a run from scratch to the byte, pass 1 is not made again, and the log says so.

    Layers are judged anew, because those that go together depend on their number.

    The scores are copies: the same command continues on the folder although the parent is gone.
    """
    verify_here(monkeypatch)
    smaller, parent = recipe(workspace, 2), Path(shutil.copytree(workspace / "parent", tmp_path / "parent"))
    scratch = command("run", smaller, "--output", tmp_path / "scratch")
    assert scratch.code == 0, scratch.err
    reused = command("run", smaller, "--output", tmp_path / "reused", "--scores-of", parent)
    assert reused.code == 0, reused.err
    assert states(tmp_path / "reused" / "model") == states(tmp_path / "scratch" / "model")
    assert states(parent / "model") != states(tmp_path / "scratch" / "model")
    steps = reused_steps(tmp_path / "reused")
    assert (steps["pass 1"], steps["ablation"]) == (True, False)
    assert not reused_steps(tmp_path / "scratch")["pass 1"]
    assert "pass 1: reused" in reused.err
    shutil.rmtree(parent)
    again = command("run", smaller, "--output", tmp_path / "reused", "--scores-of", parent)
    assert again.code == 0, again.err
    assert all(reused_steps(tmp_path / "reused").values())


def test_scores_that_cannot_be_reused(workspace: Path, tmp_path: Path) -> None:
    """A folder that is no run, or has no scores, is refused, and so is a beginning of a filled folder.

    A run that is still at work gives the scores once it has them, and nothing that it has not finished.
    """
    smaller = recipe(workspace, 2)
    for_nothing = command("run", smaller, "-o", tmp_path / "a", "--scores-of", tmp_path)
    assert (for_nothing.code, "is not the folder of a run" in for_nothing.err) == (2, True), for_nothing.err
    parent = Path(shutil.copytree(workspace / "parent", tmp_path / "parent"))
    journal = json.loads((parent / "run.json").read_text())
    with (parent / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (parent / "layer-order.json").write_text("begun")
        take_scores(parent, tmp_path / "early")
        (parent / "run.json").write_text(json.dumps(journal | {"products": {}}))
        busy = command("run", smaller, "-o", tmp_path / "b", "--scores-of", parent)
        (parent / "run.json").write_text(json.dumps(journal))
    assert (busy.code, "another run is using" in busy.err) == (2, True), busy.err
    names = sorted(path.name for path in (tmp_path / "early").iterdir())
    assert names == ["layer-scores.safetensors", "plan.json", "run.json", "scores.safetensors"]
    assert (tmp_path / "early" / "scores.safetensors").read_bytes() == (parent / "scores.safetensors").read_bytes()
    early = json.loads((tmp_path / "early" / "run.json").read_text())
    assert early["products"] == {name: journal["products"][name] for name in ("scores", "layer scores")}
    shutil.rmtree(tmp_path / "early")
    (parent / "scores.safetensors").unlink()
    without = command("run", smaller, "-o", tmp_path / "c", "--scores-of", parent)
    assert (without.code, "has no scores" in without.err) == (2, True), without.err
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "mine.txt").touch()
    filled = command("run", smaller, "-o", tmp_path / "filled", "--scores-of", workspace / "parent")
    assert (filled.code, "is not empty" in filled.err) == (2, True), filled.err
    both = command("run", smaller, "-o", tmp_path / "d", "--fresh", "--scores-of", parent)
    assert (both.code, "give one of the two" in both.err) == (2, True), both.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled", "parent"]


def test_further_tasks_are_merged_into_a_report_of_their_own(workspace: Path, tmp_path: Path) -> None:
    """The new folder has the model and a report with the task; the parent keeps its own. Weights share their disk."""
    parent, output = workspace / "parent", tmp_path / "more"
    arguments = "reevaluate", parent, "--tasks", "llmprune_agreement", "--limit", "6", "--output", output
    done = command(*arguments)
    assert done.code == 0, done.err
    before, after = report_in(parent), report_in(output)
    assert (before["tasks"], [task["task"] for task in after["tasks"]]) == ([], ["llmprune_agreement"])
    assert after["tasks"][0]["samples"] == 6
    assert after["perplexity"] == before["perplexity"]
    assert after["recipe"]["evaluation"]["limit"] == {"llmprune_agreement": 6}
    assert after["files"]["model"] == str(output / "model")
    assert states(output / "model") == states(parent / "model")
    again = command(*arguments)  # as after a kill
    assert again.code == 0, again.err
    assert report_in(output)["tasks"] == after["tasks"]
    known = command("reevaluate", output, "--tasks", "llmprune_agreement")
    assert (known.code, "evaluated already" in known.err) == (2, True), known.err


def test_training_and_zeros_begin_with_the_pruned_model(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither cuts nor scores again; both compare with the base; a training after the zeros keeps them."""
    verify_here(monkeypatch)
    settings = settings_of(workspace)
    parent = Job.model_construct(id=PARENT, recipe=(workspace / "remove-1.yaml").read_text(), overrides=(), work=None)
    sparse_job = follow_up(workspace, parent, work=Sparsify(), job=SPARSE)
    follow_up(workspace, sparse_job, work=Recover(tokens=2048), job=TRAINED)
    reports = [report_in(settings.run_folder(job)) for job in (SPARSE, TRAINED)]
    assert "pass 1" not in reused_steps(settings.run_folder(SPARSE)) | reused_steps(settings.run_folder(TRAINED))
    before = report_in(workspace / "parent")
    for report in reports:
        assert report["pruned"]["layers"] == before["pruned"]["layers"] == before["dense"]["layers"] - 1
        assert report["lineage"][0]["name"] == str(workspace / "base")
        assert report["perplexity"]["dense"] == before["perplexity"]["dense"]
    sparse, trained = (
        {name: tensor == 0 for name, tensor in load_file(settings.run_folder(job) / MODEL).items()}
        for job in (SPARSE, TRAINED)
    )
    assert reports[1]["recovery"]["tokens"] == 2048
    zeros = [name for name, mask in sparse.items() if mask.float().mean() == 0.5]
    assert zeros
    assert all((trained[name] | ~sparse[name]).all() for name in zeros)


def test_a_run_is_timed_against_the_base_of_its_report(workspace: Path, tmp_path: Path) -> None:
    """``bench`` takes a run's folder for its model and its base."""
    options = "--batch-sizes", "1", "--contexts", "4", "--new-tokens", "2", "--repeats", "1"
    done = command("bench", workspace / "parent", *options, "--output", tmp_path / "bench.json")
    assert done.code == 0, done.err
    assert f'"base": "{workspace / "base"}"' in (tmp_path / "bench.json").read_text()


def test_scores_that_are_not_there_are_noted_where_a_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run has its own; a mistyped folder is named all the same."""
    (tmp_path / "run.json").write_text("{}")
    take_scores(tmp_path / "nowhere", tmp_path)
    assert "nowhere: it is not the folder of a run" in caplog.text
