"""The command ``speed``."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import command

from llmprune.results.figures.speed_table import SpeedTable


def test_speed_prints_and_writes_a_table(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the config is needed; the file is a table of this model, and the case that the options name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    (tmp_path / "config.json").write_bytes((workspace / "base" / "config.json").read_bytes())
    options = ["--prompt-tokens", "8", "--new-tokens", "2", "--batch-size", "2", "--repeats", "2"]
    outcome = command("speed", tmp_path, *options, "-o", tmp_path / "new" / "table.json")
    assert outcome.code == 0, outcome.err
    for said in ("outside the layers", "layer without its MLP", "neurons", "tokens per second", "written to"):
        assert said in outcome.out
    table = SpeedTable.model_validate_json((tmp_path / "new" / "table.json").read_text())
    assert (table.batch_size, table.prompt_tokens, table.new_tokens) == (2, 8, 2)
    assert len(list((tmp_path / "home").rglob("*.json"))) == 1


def test_speed_refuses_before_anything_is_timed(workspace: Path, tmp_path: Path) -> None:
    """A folder in place of the file, and more tokens than the model has positions."""
    for output, options, said in (
        (tmp_path, (), "is a folder; give a file, such as"),
        (tmp_path / "table.json", ("--new-tokens", "9000"), "--prompt-tokens, --new-tokens: prompt_tokens 512 + new"),
    ):
        refused = command("speed", workspace / "base", *options, "-o", output)
        assert (refused.code, said in refused.err) == (2, True), refused.err
