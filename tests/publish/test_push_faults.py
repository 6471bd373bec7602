"""Faults of the hub during a push: temporary ones are waited for, others end it with one error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.hub.faults import Fault
from helpers.hub.server import Hub
from helpers.hub.state import Repo
from helpers.pushing import FILES, NAME, push, refuse, tree
from huggingface_hub import HfApi

WHOAMI, CREATE = "GET /api/whoami", "POST /api/repos/create"
COMMIT, BATCH, PUT, VERIFY = "POST .*/commit/", "POST .*/objects/batch", "PUT /lfs/", "POST /lfs/.*/verify"
COMMIT_FAULTS = (
    Fault(COMMIT, 429, times=2, headers={"Retry-After": "1"}),
    Fault(COMMIT, 500, times=4),
    Fault(COMMIT, lose=True, times=1),
)

PASSING_FAULTS = (
    Fault(WHOAMI, 429, times=2, headers={"Retry-After": "3"}),
    Fault(CREATE, 500, times=2),
    Fault(BATCH, 503, times=3),
    Fault(PUT, 500, times=3),
    Fault(PUT, cut=20_000, times=2),
    Fault(VERIFY, 504, times=2),
    Fault("POST /api/validate-yaml", 502, times=2, body="<html>a proxy's page"),
    *COMMIT_FAULTS,
)


def named(value: Any) -> str:
    """Return a parameter's part of a test's name."""
    return f"{value.match} {value.status or 'cut or lost'}" if isinstance(value, Fault) else " ".join(map(str, value))


@pytest.mark.parametrize(
    ("fault", "options"),
    [(fault, ()) for fault in PASSING_FAULTS] + [(fault, ("--create-pr",)) for fault in COMMIT_FAULTS],
    ids=named,
)
def test_temporary_faults_are_waited_for(hub: Hub, run: Path, fault: Fault, options: tuple[str, ...]) -> None:
    """After busy, failing, cut or lost responses there is exactly one complete commit."""
    if options:
        hub.add_repo(NAME, {}, private=True)
    hub.faults.append(replace(fault))
    outcome = push(run, *options)
    assert outcome.code == 0, outcome.err
    assert hub.faults[0].times == 0
    repo = hub.repo(NAME)
    assert len(repo.messages) == 2
    assert len(repo.pulls) == len(options)
    assert tree(repo, "refs/pr/1" if options else "main") - {".gitattributes"} == FILES - {".gitattributes"}


def another_commits(repo: Repo) -> None:
    """Make another commit first."""
    repo.commit("main", {"theirs.txt": next(iter(repo.commits[repo.refs["main"]].values()))}, "theirs")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(CREATE, 401, headers={"X-Error-Message": "Invalid credentials"}), "the hub answered 401"),
        (Fault(CREATE, 403), "the hub answered 403 (a fault of the test): the token may not do this"),
        (
            Fault(CREATE, 409, body='{"error": "reserved", "url": "https://huggingface.co/org/pruned"}'),
            "no such repository",
        ),
        (Fault("POST .*/preupload/", 404, headers={"X-Error-Code": "RepoNotFound"}), "no such repository"),
        (Fault(BATCH, 401), "the hub answered 401 (a fault of the test): the token is not valid"),
        (Fault(PUT, 403), "the hub answered 403"),
        (Fault(PUT, 500), "the hub answered 500"),
        (Fault(PUT, cut=20_000), "the hub cannot be reached"),
        (Fault(PUT, flip=True), "the hub answered 422 (The object that arrived does not have this SHA-256)"),
        (
            Fault("POST /api/validate-yaml", 400, body='{"errors": [{"message": "tags"}]}'),
            "the hub answered 400 (tags)",
        ),
        (Fault(COMMIT, 403), "the hub answered 403"),
        (Fault(COMMIT, 409), "the hub answered 409"),
        (Fault(COMMIT, 412), "another commit was made during the upload; check that commit"),
        (Fault(COMMIT, 429), "it asks for fewer requests"),
        (Fault(COMMIT, 500), "the hub answered 500 (a fault of the test), again and again"),
    ],
    ids=lambda value: f"{value.match} {value.status}" if isinstance(value, Fault) else None,
)
def test_permanent_faults_are_one_error_and_publish_nothing(hub: Hub, run: Path, fault: Fault, said: str) -> None:
    """After every permanent fault the repository has no file of the model."""
    hub.faults.append(fault)
    refuse(run, said)
    assert all(tree(repo) == {".gitattributes"} for repo in hub.repos.values())
    if fault.status == 500:
        hub.faults.clear()
        assert push(run).code == 0, "the same command later is enough"


def test_another_commit_in_between_is_not_overwritten(hub: Hub, run: Path) -> None:
    """The hub's 412: the other commit remains, and the next push is made on top of it."""
    hub.add_repo(NAME, {"README.md": b"old"}, private=True)
    hub.before_commit = another_commits
    refuse(run, f"nothing was published to {NAME}: another commit was made")
    assert hub.repo(NAME).messages == ["initial commit", "theirs"]
    hub.before_commit = None
    assert push(run).code == 0
    assert "theirs.txt" in tree(hub.repo(NAME))


def test_a_commit_with_other_contents_is_an_error(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the commit the hub's file list is compared with the files sent."""
    original = HfApi.get_paths_info

    def changed(self: HfApi, *arguments: Any, **options: Any) -> list[Any]:
        files = original(self, *arguments, **options)
        for file in files:
            if file.lfs:
                file.lfs.sha256 = "0" * 64
        return files

    monkeypatch.setattr(HfApi, "get_paths_info", changed)
    refuse(run, "does not hold the files that were sent (model.safetensors, plots/error.png, plots/importance.png)")
