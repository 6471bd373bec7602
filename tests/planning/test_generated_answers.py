"""What a plan says of answers that the models write: the warning of removed layers, the tasks, the prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.commands import TASKS, save_model
from helpers.tiny import structure_of

from llmprune.common.console import PlainConsole
from llmprune.common.errors import ModelError, RecipeError
from llmprune.evaluation.prompts import Prompts
from llmprune.planning.checks import checks_of
from llmprune.planning.plan_schema import Plan
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.recipe.recipe import Recipe
from llmprune.report.plan_table import print_plan
from llmprune.testing import tiny_config

CHOICE = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS)}


def recipe_of(model: Path, **sections: object) -> Recipe:
    """Return a recipe with calibration text of ready tokens."""
    tokens = {"tokens": "ids.safetensors", "key": "ids", "samples": 4, "sequence_length": 32}
    return Recipe.parse(yaml.safe_dump({"model": {"id": str(model)}, "calibration": tokens} | sections))


def plan_of(folder: Path, **sections: object) -> Plan:
    """Plan a tiny Llama of four layers."""
    tiny_config("llama").save_pretrained(folder)
    return structure_of(recipe_of(folder, **sections))


@pytest.mark.parametrize(
    ("sections", "warned"),
    [
        ({"depth": {"remove": 1}}, True),
        ({"depth": {"remove": 1}, "evaluation": CHOICE}, True),
        ({"depth": {"remove": 1}, "evaluation": CHOICE | {"tasks": ["llmprune_agreement", "gsm8k"]}}, False),
        ({"depth": {"remove": 1}, "evaluation": {"suite": "general"}}, False),
        ({"width": {"mlp": 0.5}}, False),
    ],
)
def test_removed_layers_without_a_generating_task(tmp_path: Path, sections: dict[str, object], warned: bool) -> None:
    """The plan warns where layers are removed and no task lets the models write, and names the remedy."""
    notes = [note for note in plan_of(tmp_path, **sections).notes if "no task generates answers" in note]
    assert len(notes) == warned
    assert all("set evaluation.suite to general" in note for note in notes)


def test_a_suite_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan lists all tasks with their limits."""
    print_plan(plan_of(tmp_path, width={"mlp": 0.5}, evaluation={"suite": "general"}), PlainConsole())
    said = " ".join(capsys.readouterr().out.split())
    assert "Tasks, with the maximum number of samples of each: arc_easy (400)," in said
    assert "gsm8k (200)" in said


def test_without_a_tokenizer_the_default_is_left_out(tmp_path: Path) -> None:
    """The answers are not compared, which is said; a recipe that asks for them is refused."""
    model = save_model(tmp_path / "model", tokenizer=False)
    left_out = TextInputs(recipe_of(model)).prompts
    assert isinstance(left_out, str)
    assert "were not compared: evaluation.generation: the model has no tokenizer" in left_out
    assert TextInputs(recipe_of(model, evaluation={"generation": False})).prompts is None
    for asked in ({"generation": {}}, {"gate": {"min_greedy_agreement": 0.5}}):
        with pytest.raises((RecipeError, ModelError), match="has no tokenizer"):
            TextInputs(recipe_of(model, evaluation=asked)).prompts  # noqa: B018  # read for its error


def test_every_recipe_has_prompts(tmp_path: Path) -> None:
    """Without an evaluation section the models answer questions."""
    found = TextInputs(recipe_of(save_model(tmp_path / "model"))).prompts
    assert isinstance(found, Prompts)
    assert len(found.ids) == 32


def test_a_plan_refuses_more_questions_than_there_are(tmp_path: Path) -> None:
    """The number is known before a run where the tokenizer decides that the models answer questions."""
    recipe = recipe_of(save_model(tmp_path / "model"), evaluation={"generation": {"samples": 65}})
    checked = {check.name: check for check in checks_of(TextInputs(recipe))}
    with pytest.raises(RecipeError, match="65 prompts, and there are 64 questions"):
        checked["generation"].run()
