"""Whole commands on tiny models, in this process: what the tests of the command share."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from helpers.tiny import tiny_tokenizer
from llmprune.testing import tiny_model

LAYERS = 4
VOCABULARY = 260  # of the model; the tokenizer has the ids 0 to 256
TASKS = Path(__file__).parents[2] / "eval" / "tasks"


@dataclass(frozen=True)
class Outcome:
    """What a person sees of a command."""

    code: int
    out: str
    err: str


def command(*arguments: str | Path) -> Outcome:
    """Run ``llmprune ARGUMENTS`` in this process."""
    from llmprune.cli.main import main

    out, err = StringIO(), StringIO()
    argv = ["llmprune", *map(str, arguments)]
    level = logging.getLogger("llmprune").level
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    logging.getLogger("llmprune").setLevel(level)
    return Outcome(code, out.getvalue(), err.getvalue())


def save_model(folder: Path, family: str = "llama", tokenizer: bool = True, **overrides: Any) -> Path:
    """A tiny random model and its tokenizer, saved as an ordinary checkpoint."""
    fields = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS} | overrides
    tiny_model(family, **fields).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, paragraphs: int = 100) -> Path:
    """A text file of so many different paragraphs of about 60 letters."""
    path.write_text(
        "\n\n".join(f"Paragraph {n}: the fox {n * n} jumps over the dog {n * 7}." for n in range(paragraphs))
    )
    return path


def write_recipe(path: Path, base: Path | str, text: Path | str, **sections: Any) -> Path:
    """A recipe that removes two of four layers and a third of the neurons; ``sections`` replace these."""
    recipe = {
        "model": {"id": str(base)},
        "calibration": {"dataset": str(text), "samples": 6, "sequence_length": 32},
        "depth": {"remove": 2},
        "width": {"neurons": 64},
    }
    named = {name: value for name, value in (recipe | sections).items() if value is not None}
    path.write_text(yaml.safe_dump(named, sort_keys=False))
    return path


def verify_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the verification's fresh process be this one, which spares ten seconds of imports."""
    from llmprune.checkpoint import verify, verify_worker

    def run(arguments: list[str], **_: Any) -> SimpleNamespace:
        out = StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(StringIO()):
                verify_worker.main(*arguments[3:])
        except Exception as error:
            return SimpleNamespace(returncode=1, stdout="", stderr=f"{type(error).__name__}: {error}")
        found = json.loads(out.getvalue()) | {"llmprune_imported": False}
        return SimpleNamespace(returncode=0, stdout=json.dumps(found), stderr="")

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


def states(folder: Path) -> dict[str, bytes]:
    """The contents of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
