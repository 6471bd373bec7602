"""Help, version and wrong arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import (
    command,
)

pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["frobnicate"], 2, "No such command"),
        (["plan"], 2, "RECIPE"),
        (["plan", "nowhere.yaml"], 2, "nowhere.yaml: the recipe cannot be read"),
        (["plan", "."], 2, "Is a directory"),
        (["run", "recipe.yaml", "--set", "depth"], 2, "section.key=value"),
        (["run", "recipe.yaml", "--set", "depht.remove=1"], 2, "did you mean 'depth'"),
        (["eval", "base"], 2, "--tasks"),
        (["eval", "base", "--tasks", " , "], 2, "--tasks"),
        (["eval", "base", "--tasks", "a", "--limit", "0"], 2, "--limit"),
        (["eval", "base", "--tasks", "a", "--include-path", "nowhere"], 2, "nowhere is not a folder"),
        (["eval", "", "--tasks", "a"], 2, "id: must be text of at least 1 character"),
        (["eval", "base", "--tasks", "a", "--output", "text.txt"], 2, "text.txt is a file"),
        (["anatomy", ""], 2, "id: must be text of at least 1 character"),
        (["anatomy", "text.txt"], 2, "text.txt is a file"),
        (["anatomy", "./nowhere"], 2, "does not exist"),
        (["anatomy", "."], 2, "has no config.json"),
        (["anatomy", "org/name@v1"], 2, "it is no hub id: that is org/name"),
        (["anatomy", "missing.gguf"], 2, "the GGUF file missing.gguf does not exist"),
        (["inspect", "text.txt"], 2, "text.txt is a file; give the hub id of a model pushed by llmprune"),
        (["inspect", "missing.gguf"], 2, "the GGUF file missing.gguf does not exist"),
        (["inspect", "../absent/recipe.yaml"], 2, "the recipe ../absent/recipe.yaml does not exist"),
        (["inspect", "x" * 300], 2, "cannot be used (File name too long); give a shorter path"),
        (["inspect", "."], 1, "has no llmprune.json: it does not hold a model pushed by llmprune"),
        (["anatomy", "package://nowhere/x.gguf"], 2, "no package 'nowhere' is installed"),
    ],
)
def test_wrong_arguments(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    """A wrong argument is one clear message on stderr and nothing on stdout."""
    monkeypatch.chdir(workspace)
    outcome = command(*arguments)
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


def test_no_arguments_show_the_help() -> None:
    """``llmprune`` alone and ``--help`` list the verbs."""
    verbs = ("plan", "run", "eval", "bench", "report", "compare", "anatomy")
    for arguments in ([], ["--help"]):
        outcome = command(*arguments)
        assert all(verb in outcome.out + outcome.err for verb in verbs)
    assert command("--help").code == 0


def test_version() -> None:
    """``--version`` prints name and version."""
    from llmprune import __version__

    assert command("--version").out == f"llmprune {__version__}\n"
