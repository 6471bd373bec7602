"""Progress of a command: the first message before the slow imports, bars on a terminal, lines elsewhere."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.commands import command, write_recipe

from llmprune.common import libraries, progress

# llmprune with the arguments given, in a process where torch cannot be imported
_NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch was asked for")
sys.meta_path.insert(0, NoTorch())
from llmprune.cli.main import main
main()
"""


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_the_first_word_comes_before_the_slow_imports(tmp_path: Path, verb: str) -> None:
    """A terminal reads what is being done before torch is imported; a log reads it for ``run``."""
    recipe = write_recipe(tmp_path / "recipe.yaml", "org/x", "org/text")
    said, terminal = pty.openpty() if verb == "plan" else os.pipe()
    arguments = [sys.executable, "-c", _NO_TORCH, verb, str(recipe)]
    process = subprocess.run(arguments, stderr=terminal, stdout=subprocess.PIPE, cwd=tmp_path, check=False)
    os.close(terminal)
    words = os.read(said, 65_536).decode().splitlines()
    os.close(said)
    assert words[0] == "Starting: loading torch and transformers", words
    assert "torch was asked for" in words[-1]
    assert process.stdout == b""


@pytest.mark.usefixtures("in_one_process")
def test_a_run_without_a_terminal_says_each_step(workspace: Path, tmp_path: Path) -> None:
    """Each step is a line with the time of day, once."""
    outcome = command("run", workspace / "recipe.yaml", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    lines = outcome.err.splitlines()
    steps = [re.fullmatch(r"\d\d:\d\d:\d\d (.+)", line) for line in lines]
    said = [step[1] for step in steps if step]
    assert len(said) == len(lines), outcome.err
    for step in ("reading text", "pass 1: scoring layers, 4 to do", "pass 2: cut and refit, 2 to do", "saving"):
        assert said.count(step) == 1, said
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    expected = [part["name"] for part in plan["durations"]["parts"]]
    reported = [next((name for name in expected if line.startswith(name)), None) for line in said]
    assert list(filter(None, reported)) == expected, "the plan's parts begin in their order, under these names"
    steps_of_report = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert [step["name"] for step in steps_of_report if step["estimated_seconds"] is not None] == [
        *("pass 1", "ablation", "pass 2", "saving", "verification")
    ]


def test_a_long_step_is_said_again(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Every few minutes a line says how far a step is and how long it may take, also where it has no layers."""
    monkeypatch.setattr(progress, "_REPEAT_EVERY", 0.01)
    with progress.lines_without_terminal():
        progress.report_progress("evaluation")
        time.sleep(0.05)
        progress.report_progress("pass 2", 3, total=12, since=time.monotonic() - 300)
        time.sleep(0.05)
        progress.report_progress("training", 4, total=8, since=time.monotonic() - 60, detail="loss 0.412")
        time.sleep(0.05)
    said = capfd.readouterr().err
    assert re.search(r" training, 4 of 8 done, loss 0.412, for 1 min now, about 1 min left$", said, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d evaluation, for 1 min now$", said, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d pass 2, 3 of 12 done, for 1 min now, about 15 min left$", said, re.MULTILINE)
    progress.report_progress("outside")
    assert capfd.readouterr().err == ""


def test_each_step_of_a_training_says_how_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress file has the words for the step that begins; other work has none."""
    path = tmp_path / "progress.json"
    monkeypatch.setenv(progress.PROGRESS_FILE, str(path))
    words = iter(["8,192 tokens", "16,384 tokens, loss 0.412"])
    found = [
        (item, json.loads(path.read_text())["detail"])
        for item in progress.track(range(2), "training", detail=lambda: next(words))
    ]
    assert found == [(0, "8,192 tokens"), (1, "16,384 tokens, loss 0.412")]
    progress.report_progress("evaluation")
    assert json.loads(path.read_text())["detail"] is None


def test_other_processes_of_a_launcher_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of several processes the first one speaks."""
    monkeypatch.setenv("RANK", "1")
    with progress.lines_without_terminal():
        progress.report_progress("pass 1")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_announces_the_imports(
    rank: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A person sees that something happens; of several processes one says so."""
    imported: list[str] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(libraries, "_imports_began", None)
    monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=imported.append))
    for name in ("disable", "enable", "freeze"):
        monkeypatch.setattr(libraries.gc, name, lambda: None)
    libraries.import_libraries(announced=True)
    assert imported[0] == "torch"
    assert libraries.seconds_of_imports() is not None
    assert capfd.readouterr().err == ("" if rank == "1" else "Starting: loading torch and transformers\n")


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_verbose_stands_before_or_after_the_command(place: int) -> None:
    """``-v`` means the same at every place."""
    arguments = ["report", "nowhere", "--output=page.html"]
    outcome = command(*arguments[:place], "-v" if place % 2 else "--verbose", *arguments[place:])
    assert outcome.log_level == logging.INFO
    assert "nowhere has no report.json" in outcome.err
