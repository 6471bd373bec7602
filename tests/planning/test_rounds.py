"""Several rounds of cut and training in a plan: the sizes after each, the work of all, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import save_model, write_text

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import IndexKinds
from llmprune.checkpoint.loading import load_config
from llmprune.common.console import PlainConsole
from llmprune.common.errors import LLMPruneError
from llmprune.planning.duration.recovering import TRAINING
from llmprune.planning.plan import make_plan
from llmprune.planning.plan_schema import Plan
from llmprune.planning.rounds.recipes import round_recipes
from llmprune.recipe.recipe import Recipe
from llmprune.report.plan_table import print_plan

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a model of eight layers and a text."""
    folder = tmp_path_factory.mktemp("rounds")
    save_model(folder / "base", num_hidden_layers=8, intermediate_size=256, max_position_embeddings=64)
    write_text(folder / "text.txt")
    return folder


def _recipe(shared: Path, change: Change = lambda _: None) -> Recipe:
    text = {"dataset": str(shared / "text.txt"), "samples": 4, "sequence_length": 32, "self_generated": 0}
    data: dict[str, Any] = {"model": {"id": str(shared / "base")}, "calibration": text, "depth": {"remove": 4}}
    data |= {"evaluation": {"generation": False}}
    data["recover"] = {"tokens": 3 * 1024, "batch_tokens": 128, "rounds": 3, "data": {"self_generated": False}}
    change(data)
    return Recipe.parse(yaml.safe_dump(data))


def _plan(shared: Path, change: Change = lambda _: None) -> Plan:
    return make_plan(_recipe(shared, change))


def _rounds(shared: Path, change: Change) -> tuple[Recipe, ...]:
    recipe = _recipe(shared, change)
    return round_recipes(recipe, discover(load_config(recipe.model), trust_remote_code=False))


def test_a_plan_lists_the_size_of_each_round(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three rounds remove layers and neurons in equal parts; steps and work are those of all, memory of the first."""
    plan = _plan(shared, lambda data: data.update(width={"mlp": 0.5}))
    assert [one.size.layers for one in plan.rounds] == [7, 5, 4]
    assert plan.rounds[-1].size == plan.pruned
    assert [one.tokens for one in plan.rounds] == [1024] * 3
    assert plan.recovery is not None
    assert (plan.recovery.steps, plan.recovery.tokens) == (24, 3 * 1024)
    assert plan.recovery.memory.weights == 4 * plan.rounds[0].size.parameters
    assert sum(part.name == TRAINING for part in plan.work.parts) == 3
    print_plan(plan, PlainConsole())
    shown = " ".join(capsys.readouterr().out.split())
    assert "in 24 steps of 4 × 32 tokens, in 3 rounds" in shown
    assert "trained on" in shown


@pytest.mark.parametrize("wanted", [0.2, 0.3, 0.55, 0.7])
def test_the_last_round_reaches_the_width_asked_for(shared: Path, wanted: float) -> None:
    """Widths between are chosen so that rounding does not move the last one; none is wider than the one before."""
    plan = _plan(shared, lambda data: data.update(width={"mlp": wanted}, depth={"remove": 3}))
    widths = [256, *(one.size.widths["intermediate_size"] for one in plan.rounds)]
    assert widths == sorted(widths, reverse=True)
    assert plan.rounds[-1].size == plan.pruned


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data.update(depth={"remove": 1}), "only 1 would remove anything.*set recover.rounds to 1"),
        (lambda data: data.pop("depth"), "recover.rounds: nothing is cut"),
        (lambda data: data["recover"].update(tokens=300), "100 tokens are fewer than one step.*each of the 3 rounds"),
        (lambda data: data.update(depth={"layers": [1, 2, 3], "keep_pattern": True}), "let the scores choose"),
    ],
)
def test_rounds_that_cannot_be_are_refused(shared: Path, change: Change, sentence: str) -> None:
    """A round that would cut nothing, or train for less than a step, and named layers in a pattern."""
    with pytest.raises(LLMPruneError) as caught:
        _plan(shared, change)
    assert re.search(sentence, str(caught.value))


def test_named_layers_are_spread_over_the_rounds(shared: Path) -> None:
    """Each round takes every third of them, counted in the model that the round before left."""
    rounds = _rounds(shared, lambda data: data.update(depth={"layers": [1, 2, 3, 5, 6, 7]}))
    assert [one.depth and one.depth.layers for one in rounds] == [(1, 5), (1, 4), (1, 3)]


def test_layers_of_kinds_by_index_go_in_whole_groups_until_the_last_round(shared: Path) -> None:
    """The sum of the rounds is what was asked for; named layers that only together can go are refused."""
    found = discover(load_config(_recipe(shared).model), trust_remote_code=False)
    periodic = replace(found, by_index=(IndexKinds("class", tuple("aab" * 2 + "aa")),))
    rounds = round_recipes(_recipe(shared, lambda data: data.update(depth={"remove": 7})), periodic)
    assert [one.depth and one.depth.remove for one in rounds] == [3, 3, 1]
    with pytest.raises(LLMPruneError, match=r"depth\.layers names layers that only together leave each other layer at"):
        round_recipes(_recipe(shared, lambda data: data.update(depth={"layers": [1, 2, 3]})), periodic)


def test_a_share_of_zeros_grows_and_groups_come_last(shared: Path) -> None:
    """Half of the weights: a sixth in each round; 2:4: in the last alone. Other sections of a round are its own."""
    rounds = _rounds(shared, lambda data: data.update(sparsity={"pattern": 0.6}))
    assert [one.sparsity and one.sparsity.pattern for one in rounds] == pytest.approx([0.2, 0.4, 0.6])
    rounds = _rounds(shared, lambda data: data.update(sparsity={"pattern": "2:4"}))
    assert [one.sparsity and one.sparsity.pattern for one in rounds] == [None, None, "2:4"]
    assert [one.recover and one.recover.against for one in rounds] == [None, *[str(shared / "base")] * 2]
    assert [one.evaluation.generation for one in rounds[:2]] == [None, None]
    assert Recipe.parse(rounds[1].text).model_dump() == rounds[1].model_dump()
