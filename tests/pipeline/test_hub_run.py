"""A recipe that pulls from the hub and pushes to it: ``run``, ``inspect`` and the run again from its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import TASKS, Outcome, command, report_in, write_text
from helpers.hub.faults import Fault
from helpers.hub.published import ROWS, draw_nothing, hub_recipe, publish_model, publish_text
from helpers.hub.server import Hub

from llmprune.common.hub import client as remote

PUSHED = {"repo_id": "org/pruned"}


pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture
def folder(hub: Hub, tmp_path: Path) -> Path:
    """An empty folder, while the hub has ``org/base`` and ``org/text``."""
    publish_model(hub, tmp_path / "base")
    publish_text(hub)
    return tmp_path


def start(folder: Path, output: str = "run", **sections: object) -> Outcome:
    """Run a recipe that names hub ids."""
    return command("run", hub_recipe(folder / "recipe.yaml", **sections), "--output", folder / output)


def writes(hub: Hub) -> list[str]:
    """Return the requests so far that change something."""
    return [line for line in hub.lines if not line.startswith(("GET", "HEAD"))]


def test_pull_prune_push_inspect_repeat(hub: Hub, folder: Path) -> None:
    """By hub ids alone: the result arrives with its proof, and the run repeats from there to the bit."""
    outcome = start(folder, hub=PUSHED)
    assert outcome.code == 0, outcome.err
    repo = hub.repo("org/pruned")
    commit = repo.refs["main"]
    assert f"hub      {hub.url}/org/pruned/commit/{commit}" in outcome.out
    base, text = hub.repo("org/base").refs["main"], hub.repo("org/text", "dataset").refs["main"]
    card = hub.content(repo, "README.md").decode()
    assert "base_model: org/base" in card
    assert "license: apache-2.0" in card
    assert f"base commit | `{base}`" in card
    assert hub.content(repo, "LICENSE") == b"Do as you like.\n"
    record = json.loads(hub.content(repo, "llmprune.json"))
    assert record["report"]["provenance"]["commit"] == base
    assert record["report"]["provenance"]["datasets"] == {"org/text": text}

    hub.lines.clear()
    assert start(folder, hub=PUSHED).code == 0
    assert writes(hub) == [], "what was pushed from this folder is not pushed again"

    shown = command("inspect", "org/pruned")
    assert shown.code == 0
    assert all(part in shown.out for part in (commit, f"org/base @ {base}", text, "have the recorded SHA-256"))
    assert json.loads(command("inspect", "org/pruned@main", "--json").out) == record

    newer(hub, "org/base", "config.json", b"{}")
    newer(hub, "org/text", "train.jsonl", ROWS[: len(ROWS) // 2].encode())
    remote.resolve_revision.cache_clear()
    hub.lines.clear()
    again = command("run", f"hub://org/pruned@{commit}", "--output", folder / "again")
    assert again.code == 0, again.err
    assert f"repeated: the weights equal those of hub://org/pruned@{commit} to the bit" in again.out
    assert writes(hub) == [], "a repeated run pushes nothing"
    other = command("run", "hub://org/pruned", "--output", folder / "other", "--set", "depth.remove=1")
    assert other.code == 0, other.err
    assert "llmprune: not as recorded in hub://org/pruned: parameters: 35232 recorded, " in other.err


def test_windows_that_the_model_wrote_are_published(hub: Hub, folder: Path) -> None:
    """A repeated run reads them and samples none; where it wants others they are sampled, which a line says."""
    calibration = {"dataset": "org/text", "samples": 8, "sequence_length": 32, "self_generated": "auto"}
    assert start(folder, hub=PUSHED, calibration=calibration).code == 0
    published = json.loads(hub.content(hub.repo("org/pruned"), "self-generated.json"))
    assert [len(ids) for ids in published["windows"]] == [32, 32]
    again = command("run", "hub://org/pruned", "--output", folder / "again")
    assert again.code == 0, again.err
    assert "repeated: the weights equal those of hub://org/pruned to the bit" in again.out
    assert "self-generated windows" not in {step["name"] for step in report_in(folder / "again")["steps"]}
    other = command("run", "hub://org/pruned", "-o", folder / "other", "--set", "calibration.self_generated=3")
    assert "3 windows of 32 tokens anew, because the published ones are 2 of 32" in other.err
    newer(hub, "org/pruned", "self-generated.json", b'{"windows": [[1, 2]]}')
    remote.resolve_revision.cache_clear()
    refused = command("run", "hub://org/pruned", "-o", folder / "third")
    assert (refused.code, "has another SHA-256 than its record" in refused.err) == (1, True), refused.err


def newer(hub: Hub, name: str, path: str, content: bytes) -> None:
    """Commit a newer version of a file that the run has read."""
    repo = next(repo for (_, other), repo in hub.repos.items() if other == name)
    repo.commit("main", repo.commits[repo.refs["main"]] | {path: hub.file(path, content)}, "newer")


def test_the_gate_decides_what_is_pushed(hub: Hub, folder: Path) -> None:
    """Below the gate the run ends with 3 and nothing is pushed, unless the recipe says always."""
    gated = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 4, "gate": {"min_retention": 0.9}}
    outcome = start(folder, hub=PUSHED, evaluation=gated)
    assert outcome.code == 3
    assert "nothing was pushed to org/pruned; see" in outcome.err
    assert writes(hub) == []
    outcome = start(folder, hub=PUSHED | {"when": "always"}, evaluation=gated)
    assert outcome.code == 3
    assert "did not meet its gate" in hub.content(hub.repo("org/pruned"), "README.md").decode()


@pytest.mark.parametrize(
    ("hub_section", "said"),
    [
        ({"repo_id": "bob/pruned"}, "ann may not write to 'bob'"),
        ({"repo_id": "org/public"}, "org/public is public"),
        ({"repo_id": "org/none", "create_pr": True}, "does not exist"),
    ],
)
def test_what_cannot_be_pushed_is_known_before_the_run(
    hub: Hub, folder: Path, hub_section: dict[str, object], said: str, no_weights: None
) -> None:
    """Token, rights and name come first: no folder, no weights, no text."""
    hub.add_repo("org/public", {})
    outcome = start(folder, hub=hub_section)
    assert (outcome.code, said in outcome.err) == (1, True), outcome.err
    assert not (folder / "run").exists()


def test_a_push_that_fails_is_made_up_for(hub: Hub, folder: Path) -> None:
    """The run is done and kept; the same command again only pushes."""
    hub.faults.append(Fault("POST .*/commit/", 503))
    outcome = start(folder, hub=PUSHED)
    assert outcome.code == 1
    assert "nothing was published to org/pruned: the hub answered 503" in outcome.err
    assert (folder / "run" / "report.json").is_file()
    hub.faults.clear()
    outcome = start(folder, hub=PUSHED)
    assert outcome.code == 0, outcome.err
    steps = json.loads((folder / "run" / "report.json").read_text())["steps"]
    assert all(step["reused"] for step in steps)


def test_inspect_finds_what_was_changed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Other weights, a lost file, an edited config: each is named; a folder is read without a hub."""
    assert start(folder, hub=PUSHED).code == 0
    repo = hub.repo("org/pruned")
    newer(hub, "org/pruned", "model.safetensors", b"other weights")
    newer(hub, "org/pruned", "config.json", b"{}")
    repo.commits[repo.refs["main"]].pop("tokenizer.json")
    remote.resolve_revision.cache_clear()
    shown = command("inspect", "org/pruned").out
    assert "model.safetensors has another SHA-256" in shown
    assert "config.json has another SHA-256" in shown
    assert "tokenizer.json is missing" in shown
    (tmp_path / "llmprune.json").write_bytes(hub.content(repo, "llmprune.json"))
    assert "org/base @ " in command("inspect", tmp_path).out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no llmprune.json: it was not pushed by llmprune"),
        (b"[]", "llmprune.json of org/other cannot be read"),
        (b"{", "llmprune.json of org/other cannot be read"),
        (b'{"format": 2}', "has format 2 and this llmprune reads 1"),
        (b'{"format": 1}', "llmprune.json of org/other cannot be read"),
    ],
)
def test_what_is_no_record(hub: Hub, content: bytes | None, said: str) -> None:
    """A model that was not pushed by llmprune, or by a later one, ends in one sentence."""
    hub.add_repo("org/other", {"llmprune.json": content} if content else {})
    for arguments in (("inspect", "org/other"), ("run", "hub://org/other")):
        outcome = command(*arguments)
        assert outcome.code == 1
        assert said.replace("org/other", arguments[1] if content else "org/other") in outcome.err


def test_a_strangers_recipe_runs_no_code(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record whose recipe trusts its model's code is repeated without that trust, unless the person says so, and on
    the GPUs of this machine.
    """
    from llmprune.publish.reproduce import recorded_recipe

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert start(folder, hub=PUSHED, model={"id": "org/base", "trust_remote_code": True}, devices=2).code == 0
    recipe, _ = recorded_recipe("hub://org/pruned")
    assert not recipe.model.trust_remote_code
    assert recipe.devices == "all"
    assert recipe.hub is None
    trusted, _ = recorded_recipe("hub://org/pruned", ["model.trust_remote_code=true"])
    assert trusted.model.trust_remote_code


def test_several_sources_are_pinned_each(hub: Hub, folder: Path) -> None:
    """Every data set of calibration and perplexity gets the commit that was read; a file, who repeats the run names."""
    from llmprune.publish.reproduce import recorded_recipe

    publish_text(hub, "org/more")
    local = write_text(folder / "text.txt")
    sources = [{"dataset": "org/text"}, {"dataset": "org/more"}, {"dataset": str(local)}]
    outcome = start(
        folder,
        hub=PUSHED,
        calibration={"sources": sources, "samples": 6, "sequence_length": 32},
        evaluation={"perplexity": {"dataset": "org/more", "samples": 2, "sequence_length": 32}},
    )
    assert outcome.code == 0, outcome.err
    recipe, _ = recorded_recipe("hub://org/pruned", [f"calibration.sources.2.dataset={local}"])
    heads = [hub.repo(name, "dataset").refs["main"] for name in ("org/text", "org/more")]
    assert [source.revision for source in recipe.calibration.sources or ()] == [*heads, None]
    assert recipe.evaluation.perplexity is not None
    assert recipe.evaluation.perplexity.revision == heads[1]


def test_a_hub_section_that_is_wrong() -> None:
    """The recipe says what is wrong with it before anything else happens."""
    from llmprune.common.errors import RecipeError
    from llmprune.recipe.recipe import Recipe

    base = "model: {id: x}\ncalibration: {dataset: y}\nhub: "
    wrong = {
        "{repo_id: name}": "hub.repo_id: a repository to push to is named with its owner",
        "{}": "hub.repo_id: is missing; add it",
        "{repo_id: a/b, token: x}": "hub.token: unknown key",
        "{repo_id: a/b, when: gate}": "hub.when: must be 'gate_passed' or 'always', not 'gate'",
        "{repo_id: a/b, create_pr: true, branch: dev}": "hub: a pull request is opened against main",
        "{repo_id: a/b, private: maybe}": "hub.private: must be true or false",
    }
    for section, said in wrong.items():
        with pytest.raises(RecipeError) as caught:
            Recipe.parse(base + section)
        assert caught.value.problems[0].startswith(said)


def test_a_searched_shape_is_repeated(hub: Hub, folder: Path) -> None:
    """The run repeats to the bit with the shape that was chosen, on the scores of the search, which is not repeated."""
    budget = {"parameters": 0.8, "tolerance": 0.2, "shapes": 2, "axes": ["layers", "mlp"]}
    outcome = start(folder, hub=PUSHED, budget=budget, depth=None, width=None)
    assert outcome.code == 0, outcome.err
    again = command("run", "hub://org/pruned", "--output", folder / "again")
    assert again.code == 0, again.err
    assert "repeated: the weights equal" in again.out, again.err
    assert "search" not in {step["name"] for step in report_in(folder / "again")["steps"]}
