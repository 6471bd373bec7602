"""Logic of the pages without a browser: the form and its recipe, repeated submissions, the list, the comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.service import RECIPE, ServiceHarness, recipe

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.service.jobs.job import Figures, JobSummary
from llmprune.service.jobs.job_name import default_name
from llmprune.service.supervisor.progress import read_figures
from llmprune.service.users.tokens import LOCAL
from llmprune.service.web.compare import comparison_of
from llmprune.service.web.new_job.first_recipe import START
from llmprune.service.web.new_job.form import RecipeForm, apply_form, form_of
from llmprune.service.web.render import _environment, render

PAGE = {"Accept": "text/html"}


def answered(text: str, **answers: str) -> str:
    """Return a recipe after some answers of its form have changed."""
    form = form_of(text)
    assert form is not None
    return apply_form(text, form.model_copy(update=answers))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda at: at.stem)
def test_an_answer_that_is_not_changed_changes_nothing(path: Path) -> None:
    """A form without changes leaves every recipe of the repository as it is, byte for byte."""
    text = path.read_text(encoding="utf-8")
    assert answered(text) == text


def test_an_answer_changes_its_value_and_nothing_else() -> None:
    """Comments, order and keys without an input are kept."""
    text = "# mine\nmodel: {id: org/model, revision: v1}  # pinned\ncalibration: {dataset: a/b}\ndepth:\n  remove: 2\n"
    wanted = text.replace("remove: 2", "remove: 3").replace("org/model", "org/other")
    assert answered(text, layers="3", model="org/other") == wanted


@pytest.mark.parametrize(
    ("answers", "place", "value"),
    [
        ({"layers": ""}, "depth", None),
        ({"width": "0.5"}, "width", {"mlp": 0.5}),
        ({"repair": "off"}, "refit", False),
        ({"tasks": "a, b ,"}, "evaluation", {"tasks": ["a", "b"]}),
        ({"speed": "on"}, "evaluation", {"speed": {"new_tokens": 32}}),
        ({"gate": "0.9"}, "evaluation", {"gate": {"min_retention": 0.9}}),
        ({"held_out": "test"}, "evaluation", {"perplexity": {"dataset": "org/text", "split": "test"}}),
        ({"dtype": "auto"}, "model", {"id": "org/model"}),
    ],
)
def test_what_each_answer_writes(answers: dict[str, str], place: str, value: object) -> None:
    """Keys are added and removed with their answers, and a section is removed with its last key."""
    assert yaml.safe_load(answered(RECIPE, **answers)).get(place) == value


def test_held_out_text_follows_the_calibration() -> None:
    """The held-out text changes with the calibration text where both name one data set, and otherwise does not."""
    both = yaml.safe_load(answered(START, dataset="org/new"))
    assert both["evaluation"]["perplexity"]["dataset"] == both["calibration"]["dataset"] == "org/new"
    apart = START.replace("    dataset: package://pydoc_data.topics/topics", "    dataset: org/held-out")
    assert yaml.safe_load(answered(apart, dataset="org/new"))["evaluation"]["perplexity"]["dataset"] == "org/held-out"


def test_another_word_for_the_same_wish_goes() -> None:
    """The number of layers to remove replaces other keys for the same setting, which exclude each other."""
    assert yaml.safe_load(answered(RECIPE.replace("remove: 1", "keep: 28"), layers="3"))["depth"] == {"remove": 3}


def test_a_size_takes_the_place_of_layers_and_widths_and_back() -> None:
    """A size in percent is written as a fraction; the sections that it excludes are removed, and the reverse."""
    by_size = answered(RECIPE, by="size", keep="82.5", width="0.5")
    assert yaml.safe_load(by_size) == {k: v for k, v in yaml.safe_load(RECIPE).items() if k != "depth"} | {
        "budget": {"parameters": 0.825}
    }
    form = form_of(by_size)
    assert form is not None
    assert (form.by, form.keep, form.layers) == ("size", "82.5", "")
    back = apply_form(by_size, form.model_copy(update={"by": "", "layers": "3"}))
    assert yaml.safe_load(back) == yaml.safe_load(RECIPE) | {"depth": {"remove": 3}}
    assert yaml.safe_load(answered(RECIPE, by="size"))["budget"] == {"parameters": 0.75}


def test_a_hidden_slider_and_another_budget_change_nothing() -> None:
    """Where layers are chosen, the slider's own value is no answer; a budget that is no fraction stays as it is."""
    assert answered(RECIPE, keep="60") == RECIPE
    bytes_ = "model: {id: a/b}\nbudget: {weights: 12GB, kv_cache: 0.8}  # mine\n"
    assert answered(bytes_, layers="4") == bytes_
    assert answered(bytes_, model="a/c") == bytes_.replace("a/b", "a/c")
    kept = answered("model: {id: a/b}\nbudget: {parameters: 0.8, kv_cache: 0.8}  # mine\n", keep="70")
    assert kept == "model: {id: a/b}\nbudget: {parameters: 0.7, kv_cache: 0.8}  # mine\n"


@pytest.mark.parametrize("text", ["[1, 2", "just words", "a: &x 1\nb: *x\n", "[" * 5_000, ""])
def test_what_is_no_mapping_is_left_alone(text: str) -> None:
    """YAML that is invalid or costly to read has no form, and the form does not change it."""
    assert form_of(text) is None
    with pytest.raises(RecipeError, match="correct it in the editor first"):
        apply_form(text, RecipeForm(model="org/model"))


def test_pressing_submit_twice_makes_one_job(tmp_path: Path) -> None:
    """Two submissions with the page's key are one job; another recipe with the same key is refused on the page."""
    harness = ServiceHarness(tmp_path)
    key = re.search(r'name="key" value="(\w+)"', harness.http.get("/submit").text)[1]
    sent = {"recipe": RECIPE, "key": key}
    first, second = (harness.http.post("/submit", data=sent, follow_redirects=False) for _ in range(2))
    assert first.headers["Location"] == second.headers["Location"]
    other = harness.http.post("/submit", data=sent | {"recipe": recipe(n=1)}, headers=PAGE)
    assert (other.status_code, "was used for another submission" in other.text) == (409, True)
    assert harness.http.get("/v1/jobs").json()["counts"]["queued"] == 1


def test_a_refusal_keeps_what_was_written(tmp_path: Path) -> None:
    """After a wrong recipe or with a full queue the page still has recipe, name and limits."""
    harness = ServiceHarness(tmp_path, max_queued=1)
    wishes = {"name": "mine", "minutes": "7", "priority": "3"}
    for text, status in (("model: 1\n", 422), (RECIPE, 200), (recipe(n=2), 429)):
        answer = harness.http.post("/submit", data=wishes | {"recipe": text}, headers=PAGE)
        assert answer.status_code == status
        if status != 200:
            assert all(f'value="{value}"' in answer.text for value in wishes.values())
            assert text in answer.text


def test_the_list_moves_in_one_request(tmp_path: Path) -> None:
    """One answer has the rows of all jobs that have not ended, the counts, and a link to new jobs."""
    harness = ServiceHarness(tmp_path)
    jobs = [harness.submit(recipe(n=n))["id"] for n in range(3)]
    listed = harness.http.get("/").text
    asked = re.search(r'hx-get="(/now[^"]+)"', listed)[1].replace("&amp;", "&")
    assert all(f"job={job}" in asked for job in jobs)
    harness.http.post(f"/v1/jobs/{jobs[0]}/cancel")
    harness.submit(recipe(n=9))
    moved = harness.http.get(asked).text
    assert all(f'id="job-{job}" hx-swap-oob' in moved for job in jobs)
    assert "Show 1 new job" in moved
    assert f"job={jobs[0]}" not in re.search(r'hx-get="(/now[^"]+)"', moved)[1]


def summary(name: str, **figures: object) -> JobSummary:
    """Return a finished job with the given figures."""
    known = {"parameters": (100, 60), "bytes": (400, 240), "layers": (4, 3)}
    fields = dict.fromkeys(JobSummary.model_fields, 0) | {"id": name, "name": name, "owner": "ann", "model": "m"}
    fields |= {"state": "succeeded", "devices": (), "launcher": "local", "figures": Figures(**known | figures)}
    return JobSummary(**fields | dict.fromkeys(("step", "detail", "error", "source", "published", "made_from"), None))


def test_one_chart_has_one_measure() -> None:
    """Jobs are compared by task scores if any has them, otherwise by perplexity; jobs without that have no number."""
    tasks, perplexity = summary("a", retention=0.9, interval=(0.8, 1.0)), summary("b", perplexity=(10.0, 12.0))
    mixed = comparison_of([perplexity, tasks])
    assert (mixed.by_tasks, mixed.numbers) == (True, {"a": 1})
    assert "whisker" in str(mixed.chart)
    alone = comparison_of([perplexity, summary("c", perplexity=(10.0, 12.0))])
    assert (alone.by_tasks, alone.numbers) == (False, {"b": 1, "c": 2})
    assert re.search(r'class="also"[^>]*>2<', str(alone.chart))
    assert comparison_of([summary("d")]).chart is None


def test_the_lines_of_compared_jobs_are_called_by_their_confidence(tmp_path: Path) -> None:
    """The page names the confidence level of a report, and those of several jobs where they differ."""
    from helpers.reports import with_confidence

    (tmp_path / "report.json").write_text(with_confidence(0.9).model_dump_json())
    figures = read_figures(tmp_path)
    assert figures is not None
    assert (figures.interval, figures.confidence) == ((0.9, 0.97), 0.9)
    jobs = [summary("a", **figures.model_dump(include={"retention", "interval", "confidence"}))]
    known = {"caller": LOCAL, "session": False, "at": "compare", "oob": False, "choice": ()}
    assert "lines are 90% intervals" in render("compare", compared=comparison_of(jobs), **known)
    jobs.append(summary("b", retention=0.8, interval=(0.7, 0.9), confidence=0.99))
    assert comparison_of(jobs).interval == "90% or 99% interval"


def test_a_result_that_nothing_measured_says_so() -> None:
    """A result without perplexity and tasks says that quality was not measured."""
    macros = _environment().get_template("macros.html.j2").module
    bare, measured = (summary("a", **figures).figures for figures in ({}, {"perplexity": (10.0, 12.0)}))
    assert str(macros.result(bare)).strip() == "−40.0% size, no measure of quality"
    assert str(macros.result(measured)).strip() == "−40.0% size, perplexity 10 → 12"


@pytest.mark.parametrize(
    ("cuts", "name"),
    [
        ({"depth": {"remove": 1}}, "base −1 layer"),
        ({"depth": {"keep": 12}}, "base 12 layers"),
        ({"width": {"mlp": 0.75}}, "base 75% MLP"),
        ({"width": {"mlp": 0.999}}, "base 99.9% MLP"),
        ({"width": {"neurons": 1152}}, "base 1,152 neurons"),
        ({"width": {"neurons": {"a": 8, "b": 8}}}, "base narrower MLP"),
        ({"width": {"heads": 2}}, "base 2 key-value heads"),
        ({"width": {"heads": 0.5}}, "base 50% heads"),
        ({"width": {"mlp": 0.5, "heads": 1}}, "base 50% MLP, 1 key-value head"),
        ({"experts": {"remove": 1}}, "base −1 expert"),
        ({"experts": {"keep": 8}}, "base 8 experts"),
        ({"sparsity": {"pattern": "2:4"}}, "base 2:4 sparse"),
        ({"budget": {"parameters": 0.75}}, "base 75% parameters"),
        ({"budget": {"parameters": [0.9, 0.8]}}, "base 90%, 80% parameters"),
        ({"budget": {"weights": "12GB", "speed": 1.5}}, "base 12 GB weights, 1.5× speed"),
    ],
)
def test_a_job_is_named_by_what_it_cuts(cuts: dict[str, Any], name: str) -> None:
    """The default name describes heads, experts and sparsity, and only what is cut."""
    data = {"model": {"id": "org/base"}, "calibration": {"dataset": "text.txt", "samples": 4, "sequence_length": 64}}
    assert default_name(Recipe.parse(json.dumps(data | cuts))) == name
