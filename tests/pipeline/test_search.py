"""Runs with a budget: the shape is searched, the model is cut to it, and a family is made of one search.

The family has fewer tokens too, the single models all of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import (
    command,
    report_in,
    reused_steps,
    save_model,
    states,
    verify_here,
    write_recipe,
    write_text,
)
from helpers.trained_tokenizers import trained_tokenizer
from torch import Tensor

from llmprune.common.errors import NumericalError
from llmprune.pipeline import run
from llmprune.pipeline.run import search_only
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.search import SearchFigures
from llmprune.search import rounds

SIZES = (0.75, 0.6)
VOCABULARY = {"coverage": 0.9, "multiple": 32}


def recipe_of(folder: Path, parameters: Any, *, name: str = "recipe.yaml", **sections: Any) -> Path:
    """Write a recipe with a budget on two texts and the dense model's own."""
    texts = write_text(folder / "prose.txt"), folder / "sums.txt"
    texts[1].write_text("\n\n".join(f"{n} + {n * 3} = {n * 4}; {n} * {n} = {n * n}." for n in range(200)))
    if not (folder / "dense").exists():
        save_model(folder / "dense", tokenizer=False, vocab_size=512, tie_word_embeddings=True)
        trained_tokenizer("bytes").save_pretrained(folder / "dense")
    calibration = {"sources": [{"dataset": str(text)} for text in texts], "samples": 12, "sequence_length": 32}
    given = {
        "calibration": calibration | {"self_generated": 4},
        "budget": {"parameters": parameters, "tolerance": 0.2, "shapes": 8},
        "depth": None,
        "width": None,
    }
    return write_recipe(folder / name, folder / "dense", texts[0], **given | sections)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the run of a family of two."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        recipe = recipe_of(folder, list(SIZES), vocabulary=VOCABULARY)
        done = command("run", recipe, "--output", folder / "family")
    assert done.code == 0, done.err
    return folder


def found_in(folder: Path) -> SearchFigures:
    """Read the result of a search."""
    return SearchFigures.model_validate_json((folder / "search.json").read_text())


def test_members_are_cut_to_the_shapes_that_were_chosen(workspace: Path) -> None:
    """Each is within its budget, has exactly the parameters that the search counted, and its report says why."""
    found = found_in(workspace / "family")
    assert len(found.chosen) == len(SIZES)
    assert found.vocabulary is not None
    page = (workspace / "family" / "family.html").read_text()
    assert all(found.chosen_shape(number).name in page for number in range(len(SIZES)))
    for number, size in enumerate(SIZES):
        report, chosen = report_in(workspace / "family" / "members" / str(number + 1)), found.chosen_shape(number)
        assert report["pruned"]["parameters"] == chosen.parameters <= size * found.dense_parameters
        removed = tuple(row["layer"] for row in report["layers"] if row["removed"])
        assert removed == chosen.removed == tuple(sorted(found.order[: len(removed)]))
        assert report["search"]["member"] == number
        assert report["pruned"]["vocabulary"] == report["vocabulary"]["kept"] == found.vocabulary < 512
        assert report["vocabulary"]["largest_logit_difference"] == 0
        cut = json.loads((workspace / "family" / "members" / str(number + 1) / "cut.json").read_text())
        assert cut["search"]["shape"] == chosen.name
        assert cut["search"]["divergence"] == chosen.divergence
        rivals = [one for one in found.tried if one.size == number and one.further is None]
        assert chosen.score == min(one.score for one in rivals if one.rounds == chosen.rounds)


def test_every_source_judges(workspace: Path) -> None:
    """Both texts, the dense model's own windows and repeated ones have divergences of their own."""
    found = found_in(workspace / "family")
    assert found.sources[2:] == ("self_generated", "repeated")
    assert len(found.sources) == 4
    assert all(set(one.divergence) == set(found.sources) for one in found.tried)
    assert found.windows == 11


def test_a_member_is_what_its_recipe_makes_alone(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe in a member's folder searches alone to the same shape, and writes the same bytes."""
    verify_here(monkeypatch)
    member = workspace / "family" / "members" / "2"
    assert yaml.safe_load((member / "recipe.yaml").read_text())["budget"]["parameters"] == SIZES[1]
    done = command("run", member / "recipe.yaml", "--output", tmp_path / "alone")
    assert done.code == 0, done.err
    assert states(tmp_path / "alone" / "model") == states(member / "model")


def test_a_quick_search_judges_shapes_as_they_are_cut(workspace: Path, tmp_path: Path) -> None:
    """At most six shapes are tried, once each; layers go in the order of their own scores, without a file of it."""
    budget = {"parameters": SIZES[1], "tolerance": 0.2, "quick": True}
    recipe = recipe_of(workspace, SIZES[1], name="quick.yaml", budget=budget)
    done = command("search", recipe, "--output", tmp_path)
    assert done.code == 0, done.err
    found = found_in(tmp_path)
    rivals = [one for one in found.tried if one.further is None]
    assert len(rivals) <= 6
    assert {one.rounds for one in found.tried} == {1}
    assert found.chosen_shape(0).score == min(one.score for one in rivals)
    assert not (tmp_path / "layer-order.json").exists()


def test_a_run_continues_from_its_search(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``llmprune search`` stops before the cut; the run on the same folder scores and searches nothing again."""
    verify_here(monkeypatch)
    recipe = recipe_of(workspace, SIZES[0], name="one.yaml", vocabulary=VOCABULARY)
    searched = command("search", recipe, "--output", tmp_path / "run")
    assert searched.code == 0, searched.err
    assert not (tmp_path / "run" / "model").exists()
    assert "shapes under a budget</h1>" in (tmp_path / "run" / "frontier.html").read_text()
    before = (tmp_path / "run" / "search.json").read_bytes()
    done = command("run", recipe, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "search.json").read_bytes() == before
    reused = reused_steps(tmp_path / "run")
    assert reused["search"]
    assert reused["pass 1"]
    assert not reused["pass 2"]
    assert found_in(tmp_path / "run").chosen_shape(0).name == found_in(workspace / "family").chosen_shape(0).name


def test_a_search_that_is_stopped_continues(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that were finished are not made again, and the result is that of a search that was not stopped."""
    recipe = Recipe.load(recipe_of(workspace, SIZES[1], name="stopped.yaml"))
    repaired, stops_at, made = rounds.repaired_divergence, [0], [0]

    def stop_at_third(*arguments: Any, **named: Any) -> Tensor:
        made[0] += 1
        if made[0] == stops_at[0]:
            raise NumericalError("stopped")
        return repaired(*arguments, **named)

    monkeypatch.setattr(rounds, "repaired_divergence", stop_at_third)
    whole = search_only(recipe, tmp_path / "whole")
    trials, made[0], stops_at[0] = made[0], 0, 3
    with pytest.raises(NumericalError):
        search_only(recipe, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "search-so-far.json").exists()
    again = search_only(recipe, tmp_path / "stopped")
    assert again.model_copy(update={"seconds": whole.seconds}) == whole
    assert made[0] == trials + 1
    names = [path.name for path in (tmp_path / "stopped").iterdir()]
    assert not [name for name in names if "partial" in name or "so-far" in name]


def test_a_search_without_repair(workspace: Path, tmp_path: Path) -> None:
    """With ``refit: false`` shapes are judged as they are cut."""
    recipe = Recipe.load(recipe_of(workspace, SIZES[0], name="plain.yaml", refit=False))
    found = search_only(recipe, tmp_path / "run")
    assert not any(one.repaired for one in found.tried)
    assert found.chosen_shape(0).score == min(one.score for one in found.tried if one.further is None)


def test_a_smaller_family_leaves_no_member_behind(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members of a longer list are gone, and the others are not made again."""
    verify_here(monkeypatch)
    shutil.copytree(workspace / "family", tmp_path / "family")
    (tmp_path / "family" / "members" / "3").mkdir()
    done = command("run", workspace / "recipe.yaml", "--output", tmp_path / "family")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "family" / "members").iterdir()) == ["1", "2"]
    assert reused_steps(tmp_path / "family" / "members" / "1")["pass 2"]


@pytest.mark.slow
def test_a_budget_in_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape is searched once, two rounds reach it, and the tokens are removed after the last."""
    verify_here(monkeypatch)
    recover = {"tokens": 24 * 32, "batch_tokens": 128, "rounds": 2, "data": {"self_generated": False}}
    budget = {"parameters": SIZES[0], "tolerance": 0.2, "axes": {"mlp": {"multiple": 8}}}
    recipe = recipe_of(tmp_path, SIZES[0], budget=budget, vocabulary=VOCABULARY, recover=recover)
    done = command("run", recipe, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    report, chosen = report_in(tmp_path / "run"), found_in(tmp_path / "run").chosen_shape(0)
    assert report["pruned"]["parameters"] == chosen.parameters
    assert tuple(row["layer"] for row in report["layers"] if row["removed"]) == chosen.removed
    sizes = [one["size"]["parameters"] for one in report["rounds"]]
    assert report["dense"]["parameters"] > sizes[0] > report["pruned"]["parameters"]
    assert report["rounds"][0]["size"]["vocabulary"] is None
    assert [step["name"] for step in report["steps"]].count("search") == 1


@pytest.mark.slow
def test_a_member_that_is_stopped_continues_with_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the text before is left in any member, not in that which was made, nor in that which was stopped."""
    verify_here(monkeypatch)
    recipe = recipe_of(tmp_path, list(SIZES))
    run_steps, made = run.run_steps, [0]

    def stop_at_second(*arguments: Any, **named: Any) -> Any:
        made[0] += 1
        if made[0] == 2:
            raise NumericalError("stopped")
        return run_steps(*arguments, **named)

    monkeypatch.setattr(run, "run_steps", stop_at_second)
    assert command("run", recipe, "--output", tmp_path / "family").code != 0
    before = report_in(tmp_path / "family" / "members" / "1")["provenance"]["calibration_fingerprint"]
    (tmp_path / "sums.txt").write_text("\n\n".join(f"{n} - {n} = 0; {n} + {n} = {2 * n}." for n in range(300)))
    done = command("run", recipe, "--output", tmp_path / "family")
    assert done.code == 0, done.err
    found = found_in(tmp_path / "family")
    for number in range(len(SIZES)):
        report = report_in(tmp_path / "family" / "members" / str(number + 1))
        assert report["provenance"]["calibration_fingerprint"] != before
        assert report["pruned"]["parameters"] == found.chosen_shape(number).parameters
        assert not any(step["reused"] for step in report["steps"] if step["name"] in ("pass 2", "cut"))


@pytest.mark.slow
def test_fresh_turns_a_family_into_a_single_run_and_back(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of run leaves nothing of the other behind."""
    verify_here(monkeypatch)
    folder = tmp_path / "run"
    shutil.copytree(workspace / "family", folder)
    alone = recipe_of(workspace, SIZES[0], name="alone.yaml", refit=False)
    assert command("run", alone, "--output", folder, "--fresh").code == 0
    assert (folder / "model" / "config.json").is_file()
    assert not (folder / "members").exists()
    assert not (folder / "family.html").exists()
    family = recipe_of(workspace, list(SIZES), name="family.yaml", refit=False)
    assert command("run", family, "--output", folder, "--fresh").code == 0
    assert not (folder / "model").exists()
    assert sorted(path.name for path in (folder / "members").iterdir()) == ["1", "2"]
    assert (folder / "family.html").is_file()
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
