"""Plans of recipes whose shape a search will choose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.budgets import base_of, budget_recipe
from helpers.public_configs import SMOLLM2_135M
from helpers.tiny import structure_of
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.checkpoint.loading import load_config
from llmprune.common.console import PlainConsole
from llmprune.common.errors import CalibrationError, EvaluationError, RecipeError
from llmprune.evaluation.bench.generation_speed import Timing
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.evaluation.bench.speed_table import measure_speed_table, write_table
from llmprune.planning.base import Base, describe_base
from llmprune.planning.budget.candidates import candidates
from llmprune.planning.budget.cost import require_windows_to_search
from llmprune.planning.budget.plan import plan_budget
from llmprune.planning.budget.space import search_space
from llmprune.planning.plan import plan_and_check
from llmprune.planning.plan_schema import Plan
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.recipe import Recipe
from llmprune.report.plan_table import print_plan
from llmprune.testing import tiny_config

SIZES = {"num_hidden_layers": 8, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
TOKENS = "vocabulary: {tokens: 256}"
RECOVER = "recover: {tokens: 3072, batch_tokens: 128, rounds: 3, data: {self_generated: false, sequence_length: 32}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the config of a model of eight layers."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module", autouse=True)
def base(folder: Path) -> Base:
    """The model of the folder."""
    return base_of(folder, tiny_config("llama", **SIZES))


def _plan(folder: Path, budget: str, sections: str = "") -> Plan:
    return structure_of(budget_recipe(folder, budget, sections=sections))


def test_a_plan_lists_the_candidates_and_the_cost_of_the_search(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes, memory and work are those of a nominal shape that cuts along every axis; the search is a part of it."""
    plan = _plan(folder, "{parameters: 0.6, tolerance: 0.1}")
    found = plan.budget
    assert found is not None
    (member,) = found.members
    assert member.limits == {"parameters": 0.6 * plan.dense.parameters}
    assert member.smallest.parameters <= plan.pruned.parameters <= member.largest.parameters <= 0.6 * 254_496
    layers, mlp, heads = member.axes
    assert (layers.name, layers.dense, mlp.dense, heads.most) == ("layers", 8, 256, 4)
    assert plan.removed_layers is None
    assert (plan.keep_layers < 8, plan.pruned.widths["intermediate_size"] < 256, plan.keep_kv_groups) == (True, True, 2)
    assert found.nominal == f"{plan.keep_layers} layers, {plan.keep_widths['intermediate_size']} neurons, 2 groups"
    assert found.search.rounds[0] == member.tried
    steps = [part.step for part in plan.work.parts]
    assert steps.index("pass 1") < steps.index("search") < steps.index("pass 2")
    assert Plan.model_validate_json(plan.model_dump_json()).budget == found
    print_plan(plan, PlainConsole())
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Budget: at most 152,698 parameters: {member.candidates} shapes, of which all are tried, from " in shown
    assert "forward passes over the calibration tokens" in shown
    assert "selected by the search" in shown
    assert f"those of one candidate: {found.nominal}" in shown


def test_a_quick_search_repairs_nothing_and_orders_by_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most six shapes are judged once, and no pass orders the layers."""
    plan = _plan(folder, "{parameters: 0.6, tolerance: 0.1, quick: true}")
    assert plan.budget is not None
    search = plan.budget.search
    assert (search.rounds[0] <= 6, search.rounds[1:], search.order_passes) == (True, (), 0.0)
    whole = _plan(folder, "{parameters: 0.6, tolerance: 0.1}").budget
    assert whole is not None
    assert search.forward_passes < whole.search.forward_passes / 2
    assert "layer order" not in [part.step for part in plan.work.parts]
    print_plan(plan, PlainConsole())
    assert "of them repaired" not in " ".join(capsys.readouterr().out.split())


def test_a_plan_of_a_family_is_that_of_its_largest_model(
    folder: Path, base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every model's candidates are listed, and the search counts all of them."""
    plan = _plan(folder, "{parameters: [0.6, 0.8], tolerance: 0.1}")
    found, alone = plan.budget, plan_budget(budget_recipe(folder, "{parameters: 0.8, tolerance: 0.1}"), base).plan
    assert found is not None
    assert [round(one.limits["parameters"]) for one in found.members] == [203_597, 152_698]
    assert found.members[0] == alone.members[0]
    assert found.nominal == alone.nominal
    assert found.search.rounds[0] == sum(one.tried for one in found.members)
    assert found.search.forward_passes > alone.search.forward_passes
    print_plan(plan, PlainConsole())
    assert "for the largest model of the family" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("budget", "note"),
    [
        ("{parameters: 0.7, weights: 1GB, tolerance: 0.1}", "budget.weights: the dense model meets it already"),
        ("{parameters: 0.95, kv_cache: 0.5, axes: [layers]}", "budget.parameters: decides nothing beside the other"),
        ("{speed: 1.5, tolerance: 0.1}", "until then the plan assumes that it grows as the parameters"),
        ("{speed: 9, tolerance: 0.1}", "until then the plan assumes that it grows as the parameters"),
        ("{parameters: 0.7, speed: 2, tolerance: 0.1}", "until then the plan's candidates are not limited by it"),
    ],
)
def test_limits_that_decide_nothing_are_noted(folder: Path, base: Base, budget: str, note: str) -> None:
    """No wish is ignored silently: a limit that is met anyway, or that the plan cannot apply, has a note."""
    notes = plan_budget(budget_recipe(folder, budget), base).notes
    assert any(note in one for one in notes), notes


def _time_by_layers(model: PreTrainedModel, prompts_BL: Tensor, new_tokens: int) -> Timing:
    """Return times in proportion to the number of layers."""
    return Timing(float(model.config.num_hidden_layers), float(model.config.num_hidden_layers))


def test_a_table_of_times_limits_the_candidates_of_a_plan(folder: Path, tmp_path: Path) -> None:
    """A table that is there is read, without any measurement; a wrong file, or a speed beyond reach, is an error."""
    settings = f"prompt_tokens: 8, new_tokens: 5, tolerance: 0.1, speed_table: '{tmp_path / 'table.json'}'"
    recipe = budget_recipe(folder, f"{{speed: 1.5, {settings}}}")
    assert recipe.budget is not None
    with pytest.raises(RecipeError, match=r"^budget.speed_table: .*table.json"):
        structure_of(recipe)
    subject = SpeedSubject.of(recipe.model)
    table = measure_speed_table(subject, settings=recipe.budget.speed_settings, time=_time_by_layers)
    write_table(tmp_path / "table.json", table)
    plan = structure_of(recipe)
    assert plan.budget is not None
    layers = plan.budget.members[0].axes[0]
    assert (layers.least, layers.most) == (5, 5)
    assert not any("budget.speed" in note for note in plan.notes)
    with pytest.raises(RecipeError, match=r"^budget.speed: 3.00× the dense model's speed cannot be reached; .*2.00×"):
        _plan(folder, f"{{speed: 3, {settings}}}")
    write_table(tmp_path / "table.json", table.model_copy(update={"spread": 0.9}))
    with pytest.raises(EvaluationError, match=r"1.5 cannot be told from 1 .*--new-tokens 5 --repeats 30 --output FILE"):
        structure_of(recipe)


def test_a_budget_is_cut_in_rounds_too(folder: Path) -> None:
    """The rounds of a recipe divide the nominal cut; the shape is searched once, before the first."""
    plan = _plan(folder, "{parameters: 0.52, tolerance: 0.1, axes: [layers]}", RECOVER)
    assert [one.size.layers for one in plan.rounds] == [7, 5, 4]
    assert [part.step for part in plan.work.parts].count("search") == 1


def test_a_single_window_cannot_judge_and_be_scored_on() -> None:
    """The plan refuses what the search would find out after the scores."""
    require_windows_to_search(Calibration(dataset="text.txt", samples=2, self_generated=0))
    with pytest.raises(CalibrationError, match=r"budget: .* the recipe's 1 are too few; raise calibration.samples"):
        require_windows_to_search(Calibration(dataset="text.txt", samples=1, self_generated=0))


def test_a_wrong_budget_is_reported_with_the_other_problems(folder: Path) -> None:
    """The problem names the key, once, beside those of other sections."""
    recipe = budget_recipe(folder, "{parameters: 0.1}", sections="devices: [7]")
    with pytest.raises(RecipeError) as caught:
        plan_and_check(recipe).require()
    budget = [one for one in caught.value.problems if one.startswith("budget.parameters: ")]
    assert len(budget) == 1
    assert len(caught.value.problems) > 1


def test_the_recipe_with_a_budget_that_ships_is_planned(tmp_path: Path) -> None:
    """A config.json is enough; every candidate is smaller than the budget and near it."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M))
    recipe = Path(__file__).parents[2] / "recipes" / "budget-smollm2-135m.yaml"
    loaded = Recipe.load(recipe, [f"model.id={tmp_path}"])
    (member,) = plan_budget(loaded, describe_base(loaded, load_config(loaded.model))).plan.members
    limit = 0.8 * 134_515_008
    assert 0.97 * limit <= member.smallest.parameters <= member.largest.parameters <= limit


def test_tokens_count_in_every_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tied or not, each size is that of the shape's model with the kept tokens; the plan says what is left for it."""
    for tied in (True, False):
        base = base_of(tmp_path / str(tied), tiny_config("llama", vocab_size=512, tie_word_embeddings=tied, **SIZES))
        recipe = budget_recipe(tmp_path / str(tied), "{parameters: 0.6, weights: 0.7}", sections=TOKENS)
        space = search_space(recipe, base)
        assert space.tokens == 256
        saved = 256 * 32 * (1 if tied else 2)
        found = candidates(space, space.members[0])
        for one in found.found:
            whole = space.counter.sizes(replace(one.shape, tokens=None))
            assert one.sizes.parameters == whole.parameters - saved
            assert one.sizes.active_parameters == whole.active_parameters - saved
            assert one.sizes.bytes == whole.bytes - 4 * saved
            assert one.sizes.kv_bytes_per_token == whole.kv_bytes_per_token
    plan = structure_of(recipe)
    assert plan.budget is not None
    part = plan.budget.members[0].vocabulary["parameters"]
    assert part.by_tokens == saved
    assert part.by_shape == pytest.approx(space.dense_sizes.parameters * 0.4 - saved)
    print_plan(plan, PlainConsole())
    assert "the vocabulary takes 16,384 parameters; for the shape remain" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ("{parameters: [0.97, 0.6]}", r"^budget.parameters: .* needs no search: with 256 tokens kept, .*of the list"),
        ("{parameters: 0.97}", r"^budget.parameters: .*vocabulary alone reaches .*remove budget to cut .*ask for less"),
        ("{parameters: 0.1}", r"^budget.parameters: .*vocabulary keeps 256 tokens.*keep fewer tokens, or ask for less"),
    ],
)
def test_a_budget_that_is_not_for_a_search(tmp_path: Path, budget: str, problem: str) -> None:
    """Fewer tokens alone meet it, or even the smallest shape with them does not."""
    base_of(tmp_path, tiny_config("llama", vocab_size=512, **SIZES))
    with pytest.raises(RecipeError, match=problem):
        _plan(tmp_path, budget, TOKENS)


def test_tokens_that_are_not_counted_yet(tmp_path: Path) -> None:
    """A plan whose text is elsewhere assumes that all tokens stay; what only fewer tokens reach is no error."""
    base_of(tmp_path, tiny_config("llama", vocab_size=512, **SIZES))
    plan = _plan(tmp_path, "{parameters: 0.12}", "vocabulary: {coverage: 0.9}")
    assert plan.budget is not None
    assert plan.budget.members[0].candidates
    assert any("until then the plan assumes that all are kept" in note for note in plan.notes)
    with pytest.raises(RecipeError, match=r"^budget.kv_cache: "):
        _plan(tmp_path, "{kv_cache: 0.01}", "vocabulary: {coverage: 0.9}")


def test_a_search_costs_more_with_the_up_refit_and_less_without_any(folder: Path, base: Base) -> None:
    """The estimate follows the repair; without one a single round decides."""
    costs = [
        plan_budget(budget_recipe(folder, "{parameters: 0.7, tolerance: 0.1}", sections=f"refit: {refit}"), base).plan
        for refit in ("false", "{}", "{up: true}")
    ]
    passes = [one.search.forward_passes for one in costs]
    assert passes == sorted(passes)
    assert len(costs[0].search.rounds) == 1
    assert len(set(passes)) == len(costs[1].search.rounds) == 3
