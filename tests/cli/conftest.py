"""A finished run with an evaluation, which the tests of the commands share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.commands import command, perplexity_of, verify_here, write_recipe


@pytest.fixture(scope="session")
def done(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, made under umask 027; no test changes it.

    Its parent has ``recipe.yaml``, and ``printed.txt`` and ``logged.txt`` with the output of the command.
    """
    folder: Path = tmp_path_factory.mktemp("evaluated-run")
    text = workspace / "text.txt"
    recipe = write_recipe(folder / "recipe.yaml", workspace / "base", text, evaluation=perplexity_of(text))
    recipe.write_text(f"# kept as it is\n{recipe.read_text()}")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        before = os.umask(0o027)
        try:
            outcome = command("run", recipe, "--output", folder / "done")
        finally:
            os.umask(before)
    assert outcome.code == 0, outcome.err
    (folder / "printed.txt").write_text(outcome.out)
    (folder / "logged.txt").write_text(outcome.err)
    return folder / "done"
