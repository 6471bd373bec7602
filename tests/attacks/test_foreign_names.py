"""Attacks by the names in a service's answers and in a stranger's record: they stay where they belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from helpers.hub.server import Hub
from helpers.service_answers import ENDED

from llmprune.common.errors import HubError, RecipeError, ServiceError
from llmprune.common.paths import is_plain_path
from llmprune.publish.provenance import fetch_record
from llmprune.publish.reproduce import recorded_recipe
from llmprune.service.client.sync.client import Client


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        *((name, True) for name in ("a", "a/b.c", ".a", "a..b", "a b", "./a", "é.txt", "model-00001.safetensors")),
        *((name, False) for name in ("", "/a", "~", "~/a", "..", "../a", "a/..", "a/../b", "a\\b", "c:a", "x://a")),
        *((name, False) for name in ("a\0", "a\n", "a\x1b[2J", "a\u202eb", None, 3, ["a"])),
    ],
)  # fmt: skip
def test_a_plain_name(name: object, plain: bool) -> None:
    """Relative, without dots that lead up, schemes, drives, and signs that nobody can see."""
    assert is_plain_path(name) == plain


JOB = "0123456789ab"


def serving(name: str) -> Client:
    """A service whose job has one file, of this name."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/artifacts"):
            return httpx.Response(200, json=[{"name": name, "bytes": 4}])
        if request.url.path.endswith(JOB):
            return httpx.Response(200, json=ENDED)
        return httpx.Response(200, text="evil")

    return Client("http://service", transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("name", ["../x", "{outside}/x", "", ".", "a/..", "a/../../x", "link/x", "a\\..\\x"])
def test_a_service_writes_only_into_the_folder(tmp_path: Path, name: str) -> None:
    """Whatever name a service gives a file, nothing appears beside the folder that was asked for, nor behind links."""
    folder, outside = tmp_path / "results", tmp_path / "outside"
    for made in (folder, outside):
        made.mkdir()
    (folder / "link").symlink_to(outside)
    with serving(name.format(outside=outside)) as client, pytest.raises(ServiceError, match="is outside"):
        client.job(JOB).fetch(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "outside", "results"]


def record(recipe: dict[str, Any], files: dict[str, str]) -> dict[str, bytes]:
    """A pushed model's record as its repository holds it."""
    fields = {
        "format": 1, "created": "2026", "recipe": yaml.safe_dump(recipe), "overrides": [], "cut": {},
        "fingerprints": {}, "files": files, "refused": None, "report": {},
    }  # fmt: skip
    return {"llmprune.json": json.dumps(fields).encode()}


RECIPE: dict[str, Any] = {
    "model": {"id": "org/base"},
    "calibration": {"dataset": "org/text"},
    "recover": {"tokens": "10K"},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.id", "/private/model"),
        ("model.id", "here"),
        ("model.id", "package://somepackage/x.gguf"),
        ("calibration.dataset", "secret.txt"),
        ("calibration.dataset", "package://antigravity/x"),
        ("evaluation.perplexity.dataset", "../secret.jsonl"),
        ("recover.data.dataset", "secret.jsonl"),
        ("recover.against", "/private/model"),
        ("evaluation.include_path", "tasks"),
        ("evaluation.tasks", ["/private/evil.yaml"]),
        ("evaluation.tasks", ["arc_easy", "evil.yaml"]),
    ],
)
def test_a_recipe_from_the_hub_opens_nothing_here(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str | list[str]
) -> None:
    """A stranger's recipe names hub ids alone, unless whoever repeats the run says the rest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE))
    inner = recipe
    *sections, last = key.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    hub.add_repo("org/pruned", record(recipe, {}))
    with pytest.raises(
        RecipeError, match=f"{key}: a recipe from the hub may only name hub ids, not .*; set it with --set {key}="
    ):
        recorded_recipe("hub://org/pruned")
    recorded_recipe("hub://org/pruned", [f"{key}={json.dumps(value)}"])


def test_a_vocabulary_from_the_hub_counts_no_text_of_this_machine(hub: Hub) -> None:
    """Text that tokens are kept for is named by hub ids, as every other text."""
    vocabulary = {"keep": 0.5, "keep_for": [{"dataset": "org/text"}, {"dataset": "secret.txt"}]}
    hub.add_repo("org/pruned", record(RECIPE | {"vocabulary": vocabulary}, {}))
    with pytest.raises(RecipeError, match=r"vocabulary.keep_for.1.dataset: a recipe from the hub may only name"):
        recorded_recipe("hub://org/pruned")
    recorded_recipe("hub://org/pruned", ["vocabulary.keep_for.1.dataset=secret.txt"])


def test_a_budget_from_the_hub_names_no_table(hub: Hub) -> None:
    """A table of times is a file of somebody's machine, and is never opened here: the recorded shape is taken."""
    budget = {"speed": 1.5, "speed_table": "/private/table.json"}
    recipe = {name: value for name, value in RECIPE.items() if name not in ("depth", "width", "experts")}
    hub.add_repo("org/pruned", record(recipe | {"budget": budget}, {}))
    found, _ = recorded_recipe("hub://org/pruned")
    assert found.budget is not None
    assert found.budget.speed_table is None


def test_a_recipe_from_the_hub_names_no_backend_and_no_tokens(hub: Hub) -> None:
    """A backend's arguments are code and addresses; a file of tokens is a file. Honest recipes pass as they are."""
    backend = {"name": "hf", "args": {"trust_remote_code": True}}
    tokens = {"calibration": {"tokens": "x.safetensors", "key": "x"}}
    hub.add_repo("org/pruned", record(RECIPE | tokens | {"evaluation": {"backend": backend}}, {}))
    with pytest.raises(RecipeError) as caught:
        recorded_recipe("hub://org/pruned")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "calibration.tokens",
        "evaluation.backend",
    ]
    topics = {"perplexity": {"dataset": "package://pydoc_data.topics/topics"}}
    hub.add_repo("org/honest", record(RECIPE | {"evaluation": topics}, {}))
    assert recorded_recipe("hub://org/honest")[0].model.id == "org/base"


def test_a_record_lists_files_of_its_repository(hub: Hub) -> None:
    """Another file would be read to compare its SHA-256."""
    hub.add_repo("org/pruned", record(RECIPE, {"../../secret.safetensors": "0"}))
    with pytest.raises(HubError, match=r"it lists the file '../../secret\.safetensors', which is not a path"):
        fetch_record("org/pruned")
