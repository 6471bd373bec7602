"""Help, version and wrong arguments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.commands import (
    command,
)

from llmprune.cli import recover_commands
from llmprune.recipe.recipe import Recipe

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
        (
            ["recover", "text.yaml", "--against", "base", "--tokens", "1K"],
            2,
            "CHECKPOINT: the recipe text.yaml does",
        ),
        (
            ["recover", "base", "--against", "./none", "--tokens", "1K"],
            2,
            "--against: the folder ./none does not",
        ),
        (["recover", " ", "--against", "base", "--tokens", "1K"], 2, "CHECKPOINT is empty; give the folder of a check"),
        (["recover", "base", "--against", "base"], 2, "say how long to train: give one of --tokens"),
        (["recover", "base", "--against", "base", "--hours", "0"], 2, "hours: must be above 0"),
        (["report", "text.txt"], 2, "text.txt cannot be read as a report"),
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


_RECIPE = "model: {id: base}\ncalibration: {dataset: text.txt}\ndepth: {remove: 1}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "recipe.yaml", "--output"],
        ["search", "recipe.yaml", "--set", "depth=null", "--set", "budget.parameters=0.5", "--output"],
        ["recover", "base", "--against", "base", "--tokens", "1K", "--output"],
        ["reevaluate", "run", "--output"],
        ["eval", "base", "--tasks", "arc_easy", "--output"],
        ["bench", "base", "--against", "base", "--output"],
        ["speed", "base", "--output"],
        ["push", "run", "--save"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """No command that writes imports the large libraries before it refuses; nothing is made."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(_RECIPE)
    Path("text.txt").write_text("text")
    Path("base").mkdir()
    for module in ("run_commands", "search_command", "model_commands", "speed_commands", "hub_commands"):
        monkeypatch.setattr(f"llmprune.cli.{module}.import_libraries", lambda announced: pytest.fail("too late"))
    outcome = command(*arguments, "text.txt/deeper/place")
    assert (outcome.code, "text.txt/deeper" in outcome.err) == (2, True), outcome.err
    monkeypatch.setattr(os, "access", lambda *_: False)
    outcome = command(*arguments, "place")
    assert (outcome.code, "no permission to write in" in outcome.err) == (2, True), outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "recipe.yaml", "text.txt"]


@pytest.mark.parametrize("name", ["123", "null", "my model: v2 #3", "{x", "'quoted\"", "a=b"])
def test_a_model_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The names that ``recover`` is given reach the recipe as they are: they are no YAML."""
    monkeypatch.chdir(tmp_path)
    given: list[Recipe] = []
    monkeypatch.setattr(recover_commands, "run_recipe", lambda _, recipe, **others: given.append(recipe))
    assert command("recover", name, "--against", f"dense {name}", "--tokens", "20M").code == 0
    assert given[0].recover is not None
    assert (given[0].model.id, given[0].recover.against) == (name, f"dense {name}")


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
