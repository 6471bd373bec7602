"""Runs with ``recover: {rounds: 2}``: cut, train, cut further, train; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command, perplexity_of, report_in, save_model, verify_here, write_recipe, write_text
from safetensors.torch import load_file

DENSE, TOKENS = 96, 24 * 32  # neurons of the tiny model; tokens of all rounds


def recipe_of(folder: Path, **sections: Any) -> Path:
    """Write a recipe that removes two of four layers and a third of the neurons in two rounds."""
    text = write_text(folder / "text.txt")
    recover = {"tokens": TOKENS, "batch_tokens": 4 * 32, "check_every": 2, "rounds": 2, "learning_rate": 1e-3}
    if not (folder / "dense").exists():
        save_model(folder / "dense")
    return write_recipe(
        folder / "recipe.yaml",
        folder / "dense",
        text,
        calibration={"dataset": str(text), "samples": 4, "sequence_length": 32},
        evaluation=perplexity_of(text),
        **{"recover": recover | {"data": {"self_generated": {"samples": 4}}} | sections.pop("recover", {})} | sections,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's model."""
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a finished run of two rounds."""
    folder = tmp_path_factory.mktemp("rounds")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        done = command("run", recipe_of(folder), "--output", folder / "run")
    assert done.code == 0, done.err
    return folder


def test_two_rounds_reach_the_sizes_asked_for(workspace: Path) -> None:
    """The first goes half of the way, the last all; both train on the dense model's predictions, and rows say so."""
    report = report_in(workspace / "run")
    assert [one["size"]["layers"] for one in report["rounds"]] == [3, 2]
    assert [one["tokens"] for one in report["rounds"]] == [TOKENS // 2, TOKENS // 2]
    assert all(one["after"] < one["before"] for one in report["rounds"])
    assert (report["dense"]["layers"], report["pruned"]["layers"]) == (4, 2)
    assert report["provenance"]["model"] == str(workspace / "dense")
    removed = [layer for one in report["rounds"] for layer in one["removed_layers"]]
    assert sorted(removed) == [row["layer"] for row in report["layers"] if row["removed"]]
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2, 3]


def test_rounds_train_on_different_windows_of_the_same_text(workspace: Path) -> None:
    """The dense model writes its windows once; held-out windows are the same in both rounds."""
    run, first = report_in(workspace / "run"), report_in(workspace / "run" / "rounds" / "1")
    written = [
        load_file(place / "recover-generated.safetensors")
        for place in (workspace / "run", workspace / "run" / "rounds" / "1")
    ]
    assert torch.equal(written[0]["windows"], written[1]["windows"])
    assert run["recovery"]["dense_perplexity"] == first["recovery"]["dense_perplexity"]
    assert all(one["name"] != "recovery windows" for one in run["steps"])


def test_a_second_run_reuses_everything(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither round is made again; the first keeps its figures, its cut and its weights, which the last one reads."""
    verify_here(monkeypatch)
    run = workspace / "run"
    made = [path.stat().st_mtime_ns for path in (run / "recovery.json", run / "rounds" / "1.json")]
    done = command("run", workspace / "recipe.yaml", "--output", run)
    assert done.code == 0, done.err
    assert all(step["reused"] for step in report_in(run)["steps"])
    assert made == [path.stat().st_mtime_ns for path in (run / "recovery.json", run / "rounds" / "1.json")]
    assert {path.name for path in (run / "rounds" / "1").iterdir()} >= {"cut.json", "model", "report.json"}
    assert not (run / "rounds" / "1" / "repaired").exists()
    assert not (run / "rounds" / "predictions.partial").exists()


def test_a_run_that_ended_in_its_first_round_continues(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of the uninterrupted run, although the first round had no model yet."""
    verify_here(monkeypatch)
    again = Path(shutil.copytree(workspace / "run", workspace / "again"))
    for name in ("rounds/1.json", "rounds/1/recovery.json", "recovery.json", "report.json"):
        (again / name).unlink()
    for name in ("rounds/1/model", "model", "repaired"):
        shutil.rmtree(again / name)
    done = command("run", workspace / "recipe.yaml", "--output", again)
    assert done.code == 0, done.err
    expected = weights(workspace / "run")
    assert weights(again).keys() == expected.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(again).items())
