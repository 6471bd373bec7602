"""Pushing to the hub: one commit with everything, or one clear error and nothing."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Outcome, command, save_model, verify_here, write_recipe, write_text
from helpers.hub.faults import Fault
from helpers.hub.published import CARD, copy_run, draw_nothing
from helpers.hub.server import Hub
from helpers.hub.state import SIGNATURE, Repo, User
from helpers.reports import gate
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from llmprune.publish.push import push_run

NAME = "org/pruned"
FILES = {
    ".gitattributes", "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "llmprune.json", "model.safetensors", "plots/error.png", "plots/importance.png", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model in a folder."""
    room = tmp_path_factory.mktemp("done")
    base, text = save_model(room / "base"), write_text(room / "text.txt")
    (base / "README.md").write_text(CARD)
    (base / "LICENSE").write_text("Do as you like.\n")
    recipe = write_recipe(room / "recipe.yaml", base, text)
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        outcome = command("run", recipe, "--output", room / "run")
    assert outcome.code == 0, outcome.err
    return room / "run"


@pytest.fixture
def run(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run for this test alone, with charts that take no time."""
    draw_nothing(monkeypatch)
    return copy_run(done, tmp_path / "run")


def push(run: Path, *options: str, name: str = NAME) -> Outcome:
    """``llmprune push`` as a person types it; the streams that it printed hold no secret."""
    outcome = command("push", run, "--repo-id", name, *options)
    printed = outcome.out + outcome.err
    assert os.environ.get("HF_TOKEN", SIGNATURE) not in printed
    assert SIGNATURE not in printed
    return outcome


def refuse(run: Path, *said: str, options: tuple[str, ...] = (), name: str = NAME, code: int = 1) -> None:
    """The push ends in one message with these parts."""
    outcome = push(run, *options, name=name)
    assert outcome.code == code, outcome.err
    message = outcome.err[outcome.err.index("llmprune: ") :]
    assert all(part in message for part in said), message
    assert "Traceback" not in outcome.err


def tree(repo: Repo, ref: str = "main") -> set[str]:
    """The files of a branch."""
    return set(repo.commits[repo.refs[ref]])


def with_gate(run: Path, passed: bool) -> None:
    """Let the run have had a gate."""
    path = run / "report.json"
    report = json.loads(path.read_text())
    report["gate"] = gate(0.9 if passed else 0.99, "pass" if passed else "fail").model_dump()
    path.write_text(json.dumps(report))


def test_everything_is_one_private_commit(hub: Hub, run: Path) -> None:
    """Model, tokenizer, licence, card, plots and provenance arrive together, as they are in the run folder."""
    outcome = push(run)
    repo = hub.repo(NAME)
    assert outcome.code == 0, outcome.err
    assert repo.private
    assert len(repo.messages) == 2
    assert repo.messages[-1].startswith("base pruned to 53.3% of its parameters, layers ")
    assert outcome.out == f"pushed 11 files to {NAME}\n{hub.url}/{NAME}/commit/{repo.refs['main']}\n"
    assert tree(repo) == FILES
    for path in (run / "model").iterdir():
        assert hub.content(repo, path.name) == path.read_bytes()
    record = json.loads(hub.content(repo, "llmprune.json"))
    assert record["recipe"] == (run / "recipe.yaml").read_text()
    assert record["cut"]["keep_layers"] == json.loads((run / "cut.json").read_text())["keep_layers"]
    assert record["fingerprints"].keys() >= {"scores", "cut", "model"}


def test_large_files_go_in_parts(hub: Hub, run: Path) -> None:
    """Where the hub asks for parts, the file is whole in the end."""
    hub.part_size = 50_000
    assert push(run).code == 0
    assert sum("/complete" in line for line in hub.lines) == 1
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert hub.content(hub.repo(NAME), "model.safetensors") == weights


def test_a_second_push_replaces_what_the_first_left(hub: Hub, run: Path) -> None:
    """Old shards would be loaded with the new weights, so they go in the same commit; what is a person's stays."""
    repo = hub.add_repo(
        NAME,
        {
            "model-00001-of-00002.safetensors": b"old",
            "model.safetensors.index.json": b"{}",
            "NOTES.md": b"mine",
            "onnx/model.safetensors.index.json": b"{}",
        },
        private=True,
    )
    assert push(run, "--commit-message", "second").code == 0
    assert tree(repo) == FILES - {".gitattributes"} | {"NOTES.md", "onnx/model.safetensors.index.json"}
    assert repo.messages == ["initial commit", "second"]
    again = [line for line in hub.lines if line.startswith("PUT")]
    assert push(run).code == 0
    assert [line for line in hub.lines if line.startswith("PUT")] == again, "what is there is not sent again"


def test_a_branch_and_a_pull_request(hub: Hub, run: Path) -> None:
    """A branch is made where it is missing; a pull request leaves main as it was."""
    assert push(run, "--branch", "narrow").code == 0
    repo = hub.repo(NAME)
    assert tree(repo) == {".gitattributes"}
    assert tree(repo, "narrow") == FILES
    outcome = push(run, "--create-pr")
    assert outcome.out.endswith(f"{hub.url}/{NAME}/discussions/1\n")
    assert tree(repo) == {".gitattributes"}
    assert tree(repo, "refs/pr/1") == FILES
    refuse(run, "a pull request is opened against main", options=("--create-pr", "--branch", "narrow"), code=2)
    refuse(run, "no pull request can be opened", options=("--create-pr",), name="org/none")


def test_public_only_where_it_is_said(hub: Hub, run: Path) -> None:
    """A public repository gets nothing from a recipe that says private, and everything with --public."""
    repo = hub.add_repo(NAME, {"README.md": b""})
    refuse(run, f"{NAME} is public on {hub.url} and hub.private is true", "--public")
    assert tree(repo) == {"README.md"}
    assert push(run, "--public").code == 0
    assert push(run, "--public", name="org/new").code == 0
    assert not hub.repo("org/new").private
    hub.add_repo("org/hidden", {}, private=True)
    assert "org/hidden is private and stays so" in push(run, "--public", name="org/hidden").err


def test_a_gate_that_was_not_met_keeps_the_model_here(hub: Hub, run: Path) -> None:
    """Only ``--when always`` pushes it, and then card and provenance say so in front."""
    with_gate(run, passed=False)
    refuse(run, "the gate was not passed: mean retention 94.83% (92.14–97.41%), at least 99.00%", "--when always")
    assert hub.repos == {}
    assert push(run, "--when", "always").code == 0
    card = hub.content(hub.repo(NAME), "README.md").decode()
    assert "**This model did not meet its gate**: the gate was not passed" in card
    assert json.loads(hub.content(hub.repo(NAME), "llmprune.json"))["refused"].startswith("the gate was not passed")
    with_gate(run, passed=True)
    assert push(run).code == 0
    assert "did not meet" not in hub.content(hub.repo(NAME), "README.md").decode()


def test_only_a_whole_finished_run_is_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    """A folder that is no run, a run without its end, and weights that were not verified go nowhere."""
    refuse(tmp_path, "is no llmprune run", code=2)
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(min(tensors))
    save_file(tensors, weights, {"format": "pt"})
    refuse(run, "parameters and 35,232 were verified; run the recipe again")
    weights.write_bytes(weights.read_bytes()[:-9])
    refuse(run, "has weights that cannot be read")
    (run / "report.json").unlink()
    refuse(run, "so it is not finished; run its recipe again first", code=2)
    assert hub.repos == {}


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
    """A wrong name is known before anything is asked."""
    refuse(run, "repo_id: ", said, name=name, code=2)
    assert hub.lines == []


def scoped(namespace: str, *permissions: str) -> tuple[dict[str, Any], ...]:
    """The rights of a fine-grained token."""
    return ({"entity": {"type": "org", "name": namespace}, "permissions": list(permissions)},)


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (None, "the token is not valid; set HF_TOKEN"),
        (User("ann", role="read", orgs={"org": "write"}), "a token of ann that may only read"),
        (User("ann"), "ann may not write to 'org', but to ann"),
        (User("ann", orgs={"org": "read", "lab": "admin"}), "ann may not write to 'org', but to ann, lab"),
        (User("ann", "fineGrained", {"org": "write"}, scoped("org", "repo.content.read")), "no write access to repos"),
        (User("ann", "fineGrained", {"org": "write"}, scoped("lab", "repo.write")), "no write access to repos"),
    ],
)
def test_rights_are_checked_before_anything_is_sent(hub: Hub, run: Path, user: User | None, said: str) -> None:
    """A token that is wrong, that may only read, or that is of somebody else."""
    hub.users.clear()
    if user:
        hub.users[os.environ["HF_TOKEN"]] = user
    refuse(run, f"{NAME} cannot be ", said)
    assert {line.split()[0] for line in hub.lines} == {"GET"}


def test_what_a_fine_grained_token_allows(hub: Hub, run: Path) -> None:
    """Write access to the namespace is enough."""
    hub.users[os.environ["HF_TOKEN"]] = User("ann", "fineGrained", {"org": "write"}, scoped("org", "repo.write"))
    assert push(run).code == 0


def test_an_existing_repository_of_others(hub: Hub, run: Path) -> None:
    """The hub itself says whether a token may write to it."""
    hub.add_repo("bob/model", {}, private=False)
    refuse(run, "bob/model cannot be pushed to: the hub answered 403", name="bob/model", options=("--public",))


def test_without_token_or_network(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, or HF_HUB_OFFLINE: said at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse(run, "HF_HUB_OFFLINE is set; unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    refuse(run, "no token was found; set HF_TOKEN, or log in with: hf auth login")
    assert hub.lines == []


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
    """A fault in the name of a test."""
    return f"{value.match} {value.status or 'cut or lost'}" if isinstance(value, Fault) else " ".join(map(str, value))


@pytest.mark.parametrize(
    ("fault", "options"),
    [(fault, ()) for fault in PASSING_FAULTS] + [(fault, ("--create-pr",)) for fault in COMMIT_FAULTS],
    ids=named,
)
def test_what_passes_is_waited_for(hub: Hub, run: Path, fault: Fault, options: tuple[str, ...]) -> None:
    """Busy, out of order, cut, or an answer that was lost: one commit in the end, not two and not half of one."""
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
    """Somebody else is quicker."""
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
        (Fault(COMMIT, 412), "somebody else committed to it during the upload; look at that commit"),
        (Fault(COMMIT, 429), "it asks for fewer requests"),
        (Fault(COMMIT, 500), "the hub answered 500 (a fault of the test), again and again"),
    ],
    ids=lambda value: f"{value.match} {value.status}" if isinstance(value, Fault) else None,
)
def test_what_does_not_pass_is_one_error_and_publishes_nothing(hub: Hub, run: Path, fault: Fault, said: str) -> None:
    """Whatever goes wrong and stays wrong: the repository has no file of the model."""
    hub.faults.append(fault)
    refuse(run, said)
    assert all(tree(repo) == {".gitattributes"} for repo in hub.repos.values())
    if fault.status == 500:
        hub.faults.clear()
        assert push(run).code == 0, "the same command later is enough"


def test_another_commit_in_between_is_not_overwritten(hub: Hub, run: Path) -> None:
    """The hub's 412: their commit stays the last one, and the next push goes on top of it."""
    hub.add_repo(NAME, {"README.md": b"old"}, private=True)
    hub.before_commit = another_commits
    refuse(run, f"nothing was published to {NAME}: somebody else committed")
    assert hub.repo(NAME).messages == ["initial commit", "theirs"]
    hub.before_commit = None
    assert push(run).code == 0
    assert "theirs.txt" in tree(hub.repo(NAME))


def test_a_commit_that_holds_something_else_is_told(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the commit the hub's own list is held against what was sent."""
    told = HfApi.get_paths_info

    def others(self: HfApi, *arguments: Any, **options: Any) -> list[Any]:
        files = told(self, *arguments, **options)
        for file in files:
            if file.lfs:
                file.lfs.sha256 = "0" * 64
        return files

    monkeypatch.setattr(HfApi, "get_paths_info", others)
    refuse(run, "does not hold what was sent (model.safetensors, plots/error.png, plots/importance.png)")


def test_the_recipe_decides_what_the_command_does_not(hub: Hub, run: Path) -> None:
    """A recipe's hub section holds for ``llmprune push`` too, and options go over it."""
    assert command("push", run).code == 2, "no name anywhere"
    report = json.loads((run / "report.json").read_text())
    report["recipe_text"] += "hub: {repo_id: ann/mine, commit_message: from the recipe}\n"
    (run / "report.json").write_text(json.dumps(report))
    assert command("push", run).code == 0
    assert hub.repo("ann/mine").messages[-1] == "from the recipe"
    assert command("push", run, "--repo-id", "ann/other", "--commit-message", "typed").code == 0
    assert hub.repo("ann/other").messages[-1] == "typed"


def test_push_from_python(hub: Hub, run: Path) -> None:
    """The function behind the command gives the commit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as those of the hub about a card's metadata
        published = push_run(run, {"repo_id": NAME})
    assert published.commit == hub.repo(NAME).refs["main"]
    assert published.files == 11
    HfApi().delete_repo(NAME)
    assert hub.repos == {}
    assert push_run(run, {"repo_id": NAME}).commit == hub.repo(NAME).refs["main"], "made anew"
