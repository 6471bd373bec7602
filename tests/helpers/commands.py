"""Whole commands on tiny models in this process, with the models, texts and recipes that they need."""

from __future__ import annotations

import gc
import json
import logging
import shutil
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
from transformers import PreTrainedModel

from helpers.tiny import tiny_tokenizer
from llmprune.testing import tiny_model

LAYERS = 4
VOCABULARY = 260  # of the model; the tokenizer has the ids 0 to 256
TASKS = Path(__file__).parents[2] / "eval" / "tasks"


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command, and the level of llmprune's logger while it ran."""

    code: int
    out: str
    err: str
    log_level: int


def command(*arguments: str | Path) -> Outcome:
    """Run ``llmprune ARGUMENTS`` in this process."""
    from llmprune.cli.main import main

    out, err = StringIO(), StringIO()
    argv = ["llmprune", *map(str, arguments)]
    logger = logging.getLogger("llmprune")
    level = logger.level
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    outcome = Outcome(code, out.getvalue(), err.getvalue(), logger.level)
    logger.setLevel(level)
    return outcome


def save_model(folder: Path, family: str = "llama", tokenizer: bool = True, **overrides: Any) -> Path:
    """Save a tiny random model and its tokenizer as an ordinary checkpoint."""
    fields = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS} | overrides
    tiny_model(family, **fields).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, paragraphs: int = 100) -> Path:
    """Write a text file of different paragraphs of about 60 letters each."""
    path.write_text(
        "\n\n".join(f"Paragraph {n}: the fox {n * n} jumps over the dog {n * 7}." for n in range(paragraphs))
    )
    return path


def write_recipe(path: Path, base: Path | str, text: Path | str, **sections: Any) -> Path:
    """Write a recipe that removes two of four layers and a third of the neurons; ``sections`` replace these.

    The models' answers are compared, and the dense model writes windows, only where ``sections`` ask for it.
    """
    recipe = {
        "model": {"id": str(base)},
        "calibration": {"dataset": str(text), "samples": 6, "sequence_length": 32},
        "depth": {"remove": 2},
        "width": {"neurons": 64},
    }
    recipe["evaluation"] = {"generation": False}
    if isinstance(evaluation := sections.get("evaluation"), dict):
        sections["evaluation"] = {"generation": False} | evaluation
    if isinstance(calibration := (recipe | sections)["calibration"], dict):
        sections["calibration"] = {"self_generated": 0} | calibration
    named = {name: value for name, value in (recipe | sections).items() if value is not None}
    path.write_text(yaml.safe_dump(named, sort_keys=False))
    return path


def prune_workspace(workspace: Path, folder: Path, base: Path | str | None = None, **sections: Any) -> Outcome:
    """Prune ``base``, or the model of the workspace, into ``folder / "out"``."""
    recipe = write_recipe(folder / "recipe.yaml", base or workspace / "base", workspace / "text.txt", **sections)
    return command("run", recipe, "--output", folder / "out")


def perplexity_of(text: Path, **more: Any) -> dict[str, Any]:
    """Return an evaluation section that measures perplexity on a text file."""
    return {"perplexity": {"dataset": str(text), "samples": 4, "sequence_length": 32}} | more


def copy_of(run: Path, folder: Path) -> Path:
    """Copy a finished run into ``folder``, for a test that changes it."""
    return Path(shutil.copytree(run, folder / "again"))


def report_in(folder: Path) -> dict[str, Any]:
    """Read the report of a run folder."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def reused_steps(folder: Path) -> dict[str, bool]:
    """Return by step of the last run whether its product was reused."""
    return {step["name"]: step["reused"] for step in report_in(folder)["steps"]}


def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where transformers loads the weights of a model."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


def verify_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify checkpoints in this process instead of a fresh one, which takes ten seconds of imports."""
    from llmprune.checkpoint.result import verify, verify_worker

    def run(arguments: list[str], **_: Any) -> SimpleNamespace:
        out = StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(StringIO()):
                verify_worker.main(*arguments[3:])
        except Exception as error:
            return SimpleNamespace(returncode=1, stdout="", stderr=f"{type(error).__name__}: {error}")
        gc.collect()  # the end of a fresh process frees its model, which accelerate's hooks hold in cycles
        found = json.loads(out.getvalue()) | {"llmprune_imported": False}
        return SimpleNamespace(returncode=0, stdout=json.dumps(found), stderr="")

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


def states(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
