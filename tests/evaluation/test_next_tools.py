"""Checks of next tools: what works, what a damaged checkpoint or a stuck tool becomes, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import command, save_model
from safetensors.torch import load_file, save_file

from llmprune.common.errors import ModelError, RecipeError
from llmprune.evaluation.next_tools.base import NotChecked, Subject, ToolFailure
from llmprune.evaluation.next_tools.registry import CHECKS
from llmprune.evaluation.next_tools.run_checks import Checkpoint, chosen_checks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("next") / "model", vocab_size=264)


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ("transformers: plain reload", "no key missing or unexpected"),
        ("transformers: cached generation", "16 greedy tokens equal"),
        ("peft: LoRA, merge", "in 10 steps; merged and reloaded (KL 0"),
    ],
)
def test_sound_checkpoint_works(tool: str, said: str, checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint that transformers saved passes the checks that need no further tool."""
    assert said in CHECKS[tool].work(Subject(checkpoint, tmp_path))


def test_damage_is_found(checkpoint: Path, tmp_path: Path) -> None:
    """A missing tensor and a weight that is not finite are failures; no tokenizer is none."""
    weights = load_file(checkpoint / "model.safetensors")
    subject = Subject(tmp_path, tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ToolFailure, match=f"missing keys: {lost}"):
        CHECKS["transformers: plain reload"].work(subject)
    save_file(weights | {lost: weights[lost] * float("nan")}, tmp_path / "model.safetensors")
    with pytest.raises(ToolFailure, match="the logits are not finite"):
        CHECKS["transformers: plain reload"].work(subject)
    with pytest.raises(NotChecked, match="has no tokenizer"):
        subject.tokenizer()


def test_checkpoint_and_tools_are_found(checkpoint: Path, tmp_path: Path) -> None:
    """A run folder stands for its model and its report; tools are chosen by the start of their names."""
    (tmp_path / "model").symlink_to(checkpoint)
    assert Checkpoint.at(tmp_path).folder == checkpoint
    assert Checkpoint.at(checkpoint).report is None
    with pytest.raises(ModelError, match=r"nothing has no config.json; give the folder of a checkpoint"):
        Checkpoint.at(tmp_path / "nothing")
    assert [check.name for check in chosen_checks(["vllm", "peft"])] == ["vLLM", "peft: LoRA, merge"]
    assert len(chosen_checks([])) == len(CHECKS)
    with pytest.raises(RecipeError, match=r"--only tensorrt: no such tool; there are transformers, llama.cpp"):
        chosen_checks(["tensorrt"])


def test_command_goes_on_after_a_tool_that_does_not_end(checkpoint: Path) -> None:
    """A tool beyond its time is a row; the exit code tells that one failed, and JSON tells which."""
    done = command("check", checkpoint, "--only", "transformers: p", "--only", "lm-eval", "--time-limit", "1", "--json")
    rows = json.loads(done.out)["checks"]
    assert [row["state"] for row in rows] == ["fails", "fails"]
    assert rows[0]["told"] == "it took longer than 1 s (--time-limit)"
    assert done.code == 1
