"""A model that is pruned again keeps its first base, by which it can be judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import save_model
from helpers.hub.server import Hub

from llmprune.common.errors import RecipeError
from llmprune.planning.lineage import ancestors_of, lineage_of, settle_first_base
from llmprune.planning.plan import plan_and_check
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.results.sentences.lineage import describe_lineage


def _record(model: str, commit: str | None, **more: Any) -> dict[str, Any]:
    return {"provenance": {"model": model, "commit": commit}, "dense": {"parameters": 1000}} | more


def _run_of(folder: Path, base: Path, record: dict[str, Any]) -> Path:
    """Make a run folder, as far as it tells where its model is from; return its model."""
    shutil.copytree(base, folder / "model")
    (folder / "report.json").write_text(json.dumps(record))
    return folder / "model"


def _recipe(model: Path | str, **evaluation: Any) -> Recipe:
    evaluation = {"generation": False, "against": "first_base"} | evaluation
    sections = {"model": {"id": str(model)}, "calibration": {"dataset": "x.txt"}, "evaluation": evaluation}
    return Recipe.parse(json.dumps(sections))


def test_the_chain_of_models_is_followed_to_the_first_base(hub: Hub, workspace: Path, tmp_path: Path) -> None:
    """A pushed model and a run folder have the same record; a third cut names the two before."""
    base = {path.name: path.read_bytes() for path in (workspace / "base").iterdir()}
    hub.add_repo("org/base", base)
    pushed = base | {"llmprune.json": json.dumps({"report": _record("org/base", "main")}).encode()}
    hub.add_repo("org/pruned", pushed)
    (first, own) = lineage_of(ModelSource(id="org/pruned"), 800)
    assert (first.name, first.commit, first.parameters) == ("org/base", "main", 1000)
    assert (own.name, own.parameters, len(own.commit or "")) == ("org/pruned", 800, 40)
    chain = [one.model_dump() for one in (first, own)]
    again = _run_of(tmp_path / "run", workspace / "base", _record("org/pruned", own.commit, lineage=chain))
    assert [one.name for one in ancestors_of(ModelSource(id=str(again)))] == ["org/base", "org/pruned"]
    plan = plan_and_check(_recipe(again, against=None)).plan
    assert plan is not None
    assert [one.name for one in plan.lineage] == ["org/base", "org/pruned", str(again)]
    assert "pruned before: org/base (1,000 parameters) → org/pruned (800 parameters, 80.0%)" in "".join(plan.notes)
    assert describe_lineage(plan.lineage[-1:], 5) is None
    settled = settle_first_base(_recipe(again))
    assert (settled.reference.id, settled.reference.revision) == ("org/base", "main")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "no record of llmprune"),
        (_record("/private/base", None), "followed only there; set evaluation.against to its folder"),
    ],
)
def test_a_first_base_that_is_not_known_is_refused(
    record: dict[str, Any], message: str, workspace: Path, tmp_path: Path
) -> None:
    """A path in a record is not opened; the plan says so beside its other problems."""
    model = _run_of(tmp_path / "run", workspace / "base", record)
    with pytest.raises(RecipeError, match=message):
        settle_first_base(_recipe(model))
    assert any(problem.startswith("evaluation.against: ") for problem in plan_and_check(_recipe(model)).errors.listed())


def test_a_reference_reads_the_same_tokens(workspace: Path, tmp_path: Path) -> None:
    """The same check as for ``recover.against``; two different references are a mistake."""
    other = save_model(tmp_path / "other", vocab_size=64)
    found = plan_and_check(_recipe(workspace / "base", against=str(other))).errors.listed()
    assert any("evaluation.against" in problem and "64 tokens in its vocabulary" in problem for problem in found)
    with pytest.raises(RecipeError, match=r"against is another model than recover\.against"):
        Recipe.parse("{model: {id: x}, recover: {tokens: 1M, against: y}, evaluation: {against: z}}")
