"""Checks before a push: repository names, tokens and their permissions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.hub.server import Hub
from helpers.hub.state import User
from helpers.pushing import NAME, push, refuse
from huggingface_hub import constants


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pruned", "a repository to push to is named with its owner, such as my-org/my-model"),
        ("org/a--b", "Cannot have -- or .. in repo_id"),
        ("org/model.git", "Repo_id cannot end by '.git'"),
        ("a/b/c", "Repo id must be in the form"),
        ("org/" + "x" * 97, "the maximum length is 96"),
    ],
)
def test_names_that_the_hub_does_not_allow(hub: Hub, run: Path, name: str, said: str) -> None:
    """An invalid name is refused without a request."""
    refuse(run, "repo_id: ", said, name=name, code=2)
    assert hub.lines == []


def scoped(namespace: str, *permissions: str) -> tuple[dict[str, Any], ...]:
    """Return the permissions of a fine-grained token."""
    return ({"entity": {"type": "org", "name": namespace}, "permissions": list(permissions)},)


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (None, "the token is not valid; set HF_TOKEN"),
        (User("ann", role="read", orgs={"org": "write"}), "a read-only token of ann"),
        (User("ann"), "ann may not write to 'org', only to ann"),
        (User("ann", orgs={"org": "read", "lab": "admin"}), "ann may not write to 'org', only to ann, lab"),
        (User("ann", "fineGrained", {"org": "write"}, scoped("org", "repo.content.read")), "cannot write to repos"),
        (User("ann", "fineGrained", {"org": "write"}, scoped("lab", "repo.write")), "cannot write to repos"),
    ],
)
def test_permissions_are_checked_before_anything_is_sent(hub: Hub, run: Path, user: User | None, said: str) -> None:
    """Invalid tokens, read-only tokens and tokens of other users are refused."""
    hub.users.clear()
    if user:
        hub.users[os.environ["HF_TOKEN"]] = user
    refuse(run, f"{NAME} cannot be ", said)
    assert {line.split()[0] for line in hub.lines} == {"GET"}


def test_what_a_fine_grained_token_allows(hub: Hub, run: Path) -> None:
    """Write access to the namespace is sufficient."""
    hub.users[os.environ["HF_TOKEN"]] = User("ann", "fineGrained", {"org": "write"}, scoped("org", "repo.write"))
    assert push(run).code == 0


def test_an_existing_repository_of_others(hub: Hub, run: Path) -> None:
    """The hub decides whether a token may write to it."""
    hub.add_repo("bob/model", {}, private=False)
    refuse(run, "bob/model cannot be pushed to: the hub answered 403", name="bob/model", options=("--public",))


def test_without_token_or_network(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing token and HF_HUB_OFFLINE are refused without a request."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse(run, "HF_HUB_OFFLINE is set; unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    refuse(run, "no token was found; set HF_TOKEN, or log in with: hf auth login")
    assert hub.lines == []
