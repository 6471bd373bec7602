"""Pushes of a finished run to the hub of the tests."""

from __future__ import annotations

import os
from pathlib import Path

from helpers.commands import Outcome, command
from helpers.hub.state import SIGNATURE, Repo

NAME = "org/pruned"

FILES = {
    ".gitattributes", "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "llmprune.json", "model.safetensors", "plots/error.png", "plots/importance.png", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def push(run: Path, *options: str, name: str = NAME) -> Outcome:
    """Run ``llmprune push``, and check that it prints no secret."""
    outcome = command("push", run, "--repo-id", name, *options)
    printed = outcome.out + outcome.err
    assert os.environ.get("HF_TOKEN", SIGNATURE) not in printed
    assert SIGNATURE not in printed
    return outcome


def refuse(run: Path, *parts: str, options: tuple[str, ...] = (), name: str = NAME, code: int = 1) -> None:
    """Check that the push ends in one message with these parts."""
    outcome = push(run, *options, name=name)
    assert outcome.code == code, outcome.err
    message = outcome.err[outcome.err.index("llmprune: ") :]
    assert all(part in message for part in parts), message
    assert "Traceback" not in outcome.err


def tree(repo: Repo, ref: str = "main") -> set[str]:
    """Return the files of a branch."""
    return set(repo.commits[repo.refs[ref]])
