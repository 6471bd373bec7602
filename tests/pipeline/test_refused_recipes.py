"""Recipes that do not fit the model or its text: one clear error each, before the expensive work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import TASKS, command, prune_workspace, write_text
from helpers.damaged_models import (
    assert_refused,
    broken,
    without_tokenizer,
)
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"depth": {"remove": 4}}, ["depth.remove", "4 layers", "at most 3"]),
        pytest.param({"depth": {"remove": 99}}, ["depth.remove", "4 layers", "99", "at most 3"]),
        ({"depth": {"keep": 0}}, ["depth.keep: must be above 0, not 0"]),
        ({"depth": {"keep": 5}}, ["depth.keep", "4 layers", "at most 4"]),
        ({"depth": {"layers": [2, 4]}}, ["depth.layers", "layers 0 to 3", "[4]"]),
        ({"width": {"neurons": 97}}, ["width.neurons: 97 is more than the 96 neurons"]),
        ({"width": {"neurons": 0}}, ["width.neurons: must be above 0, not 0"]),
        ({"width": {"mlp": 1.5}}, ["width.mlp: must be at most 1.0, not 1.5"]),
        ({"evaluation": {"gate": {"min_retention": 0.9}}}, ["evaluation.gate", "name lm-eval tasks"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_targets(workspace: Path, tmp_path: Path, sections: dict[str, Any], said: list[str]) -> None:
    """A target that the model cannot meet names key, value and limit, in ``plan`` as in ``run``."""
    outcome = prune_workspace(workspace, tmp_path, **sections)
    assert_refused(outcome, 2, *said)
    assert not (tmp_path / "out").exists()
    assert command("plan", tmp_path / "recipe.yaml").err.splitlines()[-1] == outcome.err.splitlines()[-1]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({"dataset": "empty.txt"}, ["empty.txt is empty", "give one with text"]),
        ({"dataset": "blank.jsonl", "sequence_length": 32}, ["blank.jsonl", "all its rows are blank"]),
        ({"dataset": "nowhere.txt"}, ["nowhere.txt does not exist"]),
        ({"dataset": "few.txt", "samples": 90, "sequence_length": 64}, ["few.txt", "5,760", "ask for at most"]),
        ({"dataset": "few.txt", "samples": 1, "sequence_length": 256}, ["256 tokens", "128 positions", "at most 128"]),
        ({"tokens": "beyond.safetensors", "key": "ids"}, ["299", "0 to 259", "this model's tokenizer"]),
    ],
    ids=["empty", "blank", "missing", "few", "long", "beyond"],
)
def test_calibration_that_does_not_serve(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: dict[str, Any], said: list[str]
) -> None:
    """Text that is missing, too short, or not the model's own tokens is refused before weights are read."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("blank.jsonl").write_text('{"text": ""}\n' * 3)
    write_text(Path("few.txt"), paragraphs=20)
    save_file({"ids": torch.arange(200, 300).view(2, 50)}, "beyond.safetensors")
    assert_refused(prune_workspace(workspace, tmp_path, calibration=calibration), 2, *said)
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"perplexity": {"dataset": "nowhere.txt"}}, ["nowhere.txt does not exist"]),
        ({"perplexity": {"dataset": "few.txt", "samples": 90, "sequence_length": 64}}, ["few.txt", "5,760"]),
        ({"perplexity": {"dataset": "few.txt", "samples": 1, "sequence_length": 256}}, ["128 positions"]),
        ({"perplexity": {"tokens": "beyond.safetensors", "key": "ids"}}, ["299", "0 to 259"]),
        ({"speed": {"prompt_tokens": 100, "new_tokens": 100}}, ["evaluation.speed", "128 positions"]),
    ],
    ids=["missing", "few", "long", "beyond", "speed"],
)
def test_evaluation_that_cannot_be(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: dict[str, Any], said: list[str]
) -> None:
    """What the evaluation lacks is known before the model is pruned."""
    monkeypatch.chdir(tmp_path)
    write_text(Path("few.txt"), paragraphs=20)
    save_file({"ids": torch.arange(200, 300).view(2, 50)}, "beyond.safetensors")
    assert_refused(prune_workspace(workspace, tmp_path, evaluation=evaluation), 2, *said)


@pytest.mark.usefixtures("no_weights")
def test_unknown_task(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that lm-eval does not know is refused before anything is made, with the nearest name."""
    from llmprune.evaluation.lm_eval import tasks

    own = tasks.manager_of(TASKS)  # lm-eval's full index takes 13 s
    monkeypatch.setattr(tasks, "_all_tasks", lambda folder: own)
    asked = {"tasks": ["llmprune_agrement"], "include_path": str(TASKS)}
    assert_refused(
        prune_workspace(workspace, tmp_path, evaluation=asked), 2, "evaluation.tasks", "'llmprune_agreement'?"
    )
    assert not (tmp_path / "out").exists()


def test_model_without_tokenizer_and_ready_tokens(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ready tokens need no tokenizer: the result has none either, and that is said."""
    save_file({"ids": torch.arange(256).view(8, 32)}, tmp_path / "ids.safetensors")
    ready = {"tokens": str(tmp_path / "ids.safetensors"), "key": "ids"}
    outcome = prune_workspace(workspace, tmp_path, broken(workspace, tmp_path, without_tokenizer), calibration=ready)
    assert outcome.code == 0, outcome.err
    assert not list((tmp_path / "out" / "model").glob("*token*"))
    assert "no tokenizer is loaded" in caplog.text
    with_text = {"perplexity": {"dataset": str(workspace / "text.txt"), "samples": 2, "sequence_length": 32}}
    outcome = prune_workspace(workspace, tmp_path, tmp_path / "broken", calibration=ready, evaluation=with_text)
    assert_refused(outcome, 2, "has no tokenizer")
    generation = {"generation": {"samples": 2, "prompt_tokens": 8, "new_tokens": 8}}
    with_generation = {"perplexity": ready | {"samples": 4, "sequence_length": 32}, **generation}
    outcome = prune_workspace(workspace, tmp_path, tmp_path / "broken", calibration=ready, evaluation=with_generation)
    assert_refused(outcome, 2, "has no tokenizer")
