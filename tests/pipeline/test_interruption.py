"""Interrupted runs and damaged products: the run continues, and a finished model is never damaged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command, prune_workspace, states, write_recipe
from helpers.damaged_models import (
    assert_refused,
    with_tensors,
)

from llmprune.checkpoint.result.saving import CheckpointWriter

pytestmark = pytest.mark.usefixtures("in_one_process")


def test_verification_refuses_a_corrupt_result(
    workspace: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that changed between computing and reloading is found, and the old model stays."""
    from llmprune.checkpoint.result.saving import CheckpointWriter

    model = states(finished / "model")
    original = CheckpointWriter.finish

    def finish(writer: CheckpointWriter, *arguments: Any) -> None:
        original(writer, *arguments)
        with_tensors(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))(writer.folder)

    monkeypatch.setattr(CheckpointWriter, "finish", finish)
    recipe = write_recipe(tmp_path / "recipe.yaml", workspace / "base", workspace / "text.txt", depth={"remove": 1})
    outcome = command("run", recipe, "--output", finished, "--fresh")
    assert_refused(outcome, 1, "logits differ", "is not published")
    assert states(finished / "model") == model


def test_damaged_products_are_made_again(
    workspace: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A product that cannot be read is made again, with a warning that names it."""
    model = states(finished / "model")
    (finished / "scores.safetensors").write_bytes(b"nonsense")
    (finished / "pruning.json").write_text("{}")
    assert prune_workspace(workspace, tmp_path).code == 0
    assert "scores.safetensors is damaged" in caplog.text
    assert "pruning.json is damaged" in caplog.text
    assert states(finished / "model") == model


def test_journal_that_cannot_be_read(workspace: Path, tmp_path: Path, finished: Path) -> None:
    """A damaged journal, and one of another version, is refused with the remedy, and the remedy works."""
    (finished / "run.json").write_text('{"format": 99}')
    assert_refused(prune_workspace(workspace, tmp_path), 2, "another version of llmprune", "format 99", "--fresh")
    (finished / "run.json").write_text("{")
    assert_refused(prune_workspace(workspace, tmp_path), 2, "run.json cannot be read", "--fresh")
    assert command("run", tmp_path / "recipe.yaml", "--output", finished, "--fresh").code == 0


# The command with a pass 2 that waits after its first layer. Ctrl-C reaches it even where the tests run in the
# background, whose processes ignore it.
_SLOW = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmprune.checkpoint.result.saving import CheckpointWriter
write = CheckpointWriter.write_layer
def write_and_wait(self, index, tensors):
    write(self, index, tensors)
    time.sleep(60)
CheckpointWriter.write_layer = write_and_wait
from llmprune.cli.main import main
main()
"""


def test_interrupted_run_continues(workspace: Path, tmp_path: Path) -> None:
    """Ctrl-C in pass 2 ends with a sentence and no model; the same command continues."""
    recipe = write_recipe(tmp_path / "recipe.yaml", workspace / "base", workspace / "text.txt")
    arguments = ["run", str(recipe), "--output", str(tmp_path / "out")]
    command_line = [sys.executable, "-c", _SLOW, *arguments]
    first = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("layer-00000-*.safetensors")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    busy = command(*arguments)
    assert_refused(busy, 2, "another run is using")
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert said.endswith("\nllmprune: stopped; run the same command again to continue\n")
    assert not (tmp_path / "out" / "model").exists()
    assert command(*arguments).code == 0
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert {step["name"] for step in steps if step["reused"]} == {"pass 1", "ablation"}
    assert (tmp_path / "out" / "model" / "config.json").is_file()
