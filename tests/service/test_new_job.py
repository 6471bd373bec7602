"""The page for a new job: its questions, problems by line, the schema for completion, and the draft."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2 as httpx
import pytest
import yaml
from fastapi.testclient import TestClient
from helpers.service import RECIPE, ServiceHarness, recipe, settings_in

from llmprune.recipe.recipe import Recipe
from llmprune.service.api.app import create_app
from llmprune.service.jobs.drafts import MAX_DRAFTS, Draft, Drafts
from llmprune.service.recipe_policy.policy import examine
from llmprune.service.recipe_policy.yaml_limits import RECIPE_LIMIT
from llmprune.service.web.new_job.first_recipe import START, first_recipe
from llmprune.service.web.new_job.form import apply_form, follows, form_of
from llmprune.service.web.new_job.problem_lines import with_lines
from llmprune.service.web.new_job.repairs import CLOSED, LOOK, REPAIRS
from llmprune.service.web.new_job.uses import OWN, USES

HTML = {"Accept": "text/html"}
SHAPED = "model: {id: org/model}\ncalibration: {dataset: org/text}\nbudget: {parameters: 0.75}\n"


def answered(text: str, **answers: str) -> str:
    """Return a recipe after some answers of its form have changed."""
    form = form_of(text)
    assert form is not None
    return apply_form(text, form.model_copy(update=answers))


@pytest.mark.parametrize("source", ["hub", "here"])
@pytest.mark.parametrize("repair", [one.name for one in REPAIRS])
@pytest.mark.parametrize("use", [one.name for one in USES])
def test_every_answer_writes_a_valid_recipe(use: str, source: str, repair: str, tmp_path: Path) -> None:
    """Each use, source and repair gives a recipe that may run, and the form of that recipe shows the same answers."""
    dataset = "org/mine" if use == OWN else ""
    text = answered(START, use=use, source=source, repair=repair, dataset=dataset)
    assert examine(text, (), settings=settings_in(tmp_path)).problems == []
    form = form_of(text)
    assert form is not None
    only_on_the_hub = use in ("chat", OWN)
    assert (form.use, form.repair, form.source) == (use, repair, "hub" if only_on_the_hub else source)
    parsed = Recipe.parse(text)
    assert parsed.evaluation.perplexity is not None
    assert (parsed.recover is not None) == (repair == "distillation")
    budget = Recipe.parse(START).budget
    assert budget is not None
    assert parsed.budget == budget.model_copy(update={"quick": repair == LOOK})


def test_calibration_and_held_out_text_of_a_use_differ() -> None:
    """No use is judged on the rows that it is calibrated on."""
    for use in USES:
        for text in use.texts.values():
            keys = ("dataset", "config", "split")
            calibrated = Recipe.model_validate({"model": {"id": "a/b"}, "calibration": dict(text.calibration)})
            rows = {(one.dataset, one.config, one.split) for one in calibrated.calibration.text_sources()}
            assert (*(text.perplexity.get(key) for key in keys[:2]), text.perplexity.get("split", "train")) not in rows


def test_a_use_replaces_text_and_suite_and_nothing_else() -> None:
    """Tasks, gate, size and repair stay; the inputs of the text before are no answers."""
    before = answered(START, tasks="hellaswag", gate="0.9", repair="block", use="chat")
    after = yaml.safe_load(answered(before, use="code", source="here", samples="7", held_out="old"))
    assert after["calibration"] == {"dataset": "package://asyncio/*.py", "samples": 20, "sequence_length": 256}
    assert "suite" not in after["evaluation"]
    kept = yaml.safe_load(before)
    assert (after["budget"], after["refit"]) == (kept["budget"], kept["refit"])
    assert (after["evaluation"]["tasks"], after["evaluation"]["gate"]) == (["hellaswag"], {"min_retention": 0.9})


@pytest.mark.parametrize(("use", "source"), [("general", "here"), ("chat", "hub"), (OWN, "hub")])
def test_a_first_look_is_taken_back(use: str, source: str) -> None:
    """It takes little text and a quick search, stays where the use or the kind of size changes, and leaves nothing."""
    before = answered(START, use=use, source=source, dataset="org/mine" if use == OWN else "")
    look = answered(before, repair=LOOK)
    parsed = Recipe.parse(look)
    assert parsed.calibration.read_shape() == (16, 128)
    assert parsed.budget is not None
    assert parsed.budget.quick
    assert (parsed.evaluation.limit is not None) == (use == "chat")
    assert yaml.safe_load(answered(look, repair=CLOSED)) == yaml.safe_load(before)
    for changed in (answered(look, use="code"), answered(answered(look, by=""), by="size", keep="60")):
        form = form_of(changed)
        assert form is not None
        assert (form.repair, form.samples) == (LOOK, "16")
    assert form_of(answered(look, samples="17")).repair == LOOK  # type: ignore[union-attr]


def test_ones_own_text_waits_for_its_name() -> None:
    """The choice alone changes nothing; the name takes the place of the mix, and its rest is held out."""
    assert answered(START, use=OWN) == START
    named = yaml.safe_load(answered(START, use=OWN, dataset="org/mine"))
    assert named["calibration"] == {"dataset": "org/mine", "split": "train[:80%]"}
    assert named["evaluation"]["perplexity"] == {"dataset": "org/mine", "split": "train[80%:]"}
    longer = yaml.safe_load(answered(yaml.safe_dump(named), dataset="org/mine2"))
    assert longer["evaluation"]["perplexity"]["dataset"] == longer["calibration"]["dataset"] == "org/mine2"


def test_the_form_is_shown_anew_only_where_a_choice_changed_other_answers() -> None:
    """A slider or a text that is typed never loses the focus; a use that changes other inputs updates them."""
    form = form_of(START)
    assert form is not None
    typed = form.model_copy(update={"model": "org/model", "keep": "70"})
    assert follows(apply_form(START, typed), typed, before=form) is None
    chosen = form.model_copy(update={"use": "chat"})
    changed = follows(apply_form(START, chosen), chosen, before=form)
    assert changed is not None
    assert (changed.use, changed.source, changed.suite, changed.samples) == ("chat", "hub", "chat", "")


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("calibration.samples: must be a whole number", 3),
        ("calibration.sources.1.dataset: no such data set", 6),
        ("calibration.nosuch: is no key", 2),
        ("evaluation.tasks: none", 1),
        ("line 4, column 2: not valid YAML", 4),
        ("the model is too large", None),
    ],
)
def test_a_problem_has_the_line_of_its_key(problem: str, line: int | None) -> None:
    """The deepest key that the recipe has; for a section that is missing, the first line."""
    text = "model: {id: a/b}\ncalibration:\n  samples: x\n  sources:\n    - dataset: a\n    - dataset: b\n"
    assert [one.line for one in with_lines(text, [problem])] == [line]


def test_costly_text_has_no_lines() -> None:
    """YAML that is costly to read is not read for its lines."""
    assert with_lines("[" * 50_000, ["model.id: missing"])[0].line is None


def form(**fields: str) -> dict[str, str]:
    """Return the fields of the page."""
    return {"recipe": RECIPE, "launcher": "local"} | fields


def text_of(page: str) -> str:
    """Return the text in the page's editor."""
    found = re.search(r"<textarea[^>]*>(.*?)</textarea>", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_draft_is_kept_until_it_is_submitted(tmp_path: Path) -> None:
    """It survives a restart and is each user's own; submission, and nothing before, ends it."""
    harness = ServiceHarness(tmp_path)
    tokens = {name: harness.service.tokens.create(name, "user") for name in ("ann", "bob")}

    def get(http: TestClient, name: str, path: str = "/submit") -> str:
        return http.get(path, headers=HTML | {"Authorization": f"Bearer {tokens[name]}"}).text

    def post(path: str, **fields: str) -> httpx.Response:
        headers = HTML | {"Authorization": f"Bearer {tokens['ann']}"}
        return harness.http.post(path, data=fields, headers=headers, follow_redirects=False)

    draft = form(recipe=recipe(n=3), name="by hand", minutes="7", hub_token="hf_secret", key="k")
    assert "Draft saved" in post("/submit/draft", **draft).text
    again = TestClient(create_app(harness.settings), base_url="http://127.0.0.1:8321")
    page = get(again, "ann")
    assert text_of(page) == recipe(n=3)
    assert all(f'value="{value}"' in page for value in ("by hand", "7"))
    assert "This is your draft, saved just now" in page
    assert "hf_secret" not in (harness.settings.database.read_bytes() + page.encode()).decode("latin-1")
    assert text_of(get(again, "bob")) == first_recipe(harness.settings)
    assert post("/submit", **draft | {"recipe": "model: 1\n"}).status_code == 422
    assert text_of(get(harness.http, "ann")) == "model: 1\n"
    sent = post("/submit", **draft)
    assert sent.status_code == 303
    assert text_of(get(harness.http, "ann")) == first_recipe(harness.settings)
    assert text_of(get(harness.http, "ann", "/submit?sent=k")) == recipe(n=3)
    assert text_of(get(harness.http, "bob", "/submit?sent=k")) == first_recipe(harness.settings)


def test_a_draft_gives_way_to_what_is_asked_for_and_is_discarded_by_a_button(tmp_path: Path) -> None:
    """The recipe of a job is shown with a link to the draft, which stays; the button begins anew."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit(recipe(n=1))["id"]
    harness.http.post("/submit/draft", data=form(recipe=recipe(n=2)))
    other = harness.http.get(f"/submit?again={job}").text
    assert (text_of(other), "You have a draft" in other) == (recipe(n=1), True)
    assert text_of(harness.http.get("/submit").text) == recipe(n=2)
    page = harness.http.post("/submit/draft/discard")
    assert (text_of(page.text), "draft, saved" in page.text) == (first_recipe(harness.settings), False)


def test_drafts_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is longer than a recipe may be is not stored, and the page says so; the oldest give way."""
    harness = ServiceHarness(tmp_path)
    harness.http.post("/submit/draft", data=form())
    told = harness.http.post("/submit/draft", data=form(recipe="#" * (RECIPE_LIMIT + 1))).text
    assert "The draft is not saved: it is longer than" in told
    assert text_of(harness.http.get("/submit").text) == RECIPE
    assert harness.http.post("/submit/draft", data=form(gpus="many")).status_code == 422
    monkeypatch.setattr("llmprune.service.jobs.drafts.MAX_DRAFTS", 2)
    drafts = Drafts(harness.service.database)
    for name in ("a", "b", "c"):
        drafts.save(name, Draft(name))
    assert [drafts.get(name) is not None for name in ("local", "a", "b", "c")] == [False, False, True, True]
    assert MAX_DRAFTS > 1000


def test_a_page_that_is_left_as_it_was_is_no_draft(tmp_path: Path) -> None:
    """What every new page shows is not kept, and takes the place of a draft."""
    harness = ServiceHarness(tmp_path)
    for text in (RECIPE, first_recipe(harness.settings)):
        harness.http.post("/submit/draft", data=form(recipe=text))
    assert "draft, saved" not in harness.http.get("/submit").text


def test_the_schema_for_completion_has_what_may_be_written_here(tmp_path: Path) -> None:
    """Mixes and suites are named, and keys that the service refuses are left out."""
    schema = ServiceHarness(tmp_path).http.get("/submit/schema").json()
    sections = schema["$defs"]
    assert "general" in sections["Calibration"]["properties"]["mix"]["enum"]
    assert "mathematics" in sections["Evaluation"]["properties"]["suite"]["enum"]
    assert "hub" not in schema["properties"]
    assert "backend" not in sections["Evaluation"]["properties"]
    assert "trust_remote_code" not in sections["ModelSource"]["properties"]
    assert "description" in sections["Budget"]["properties"]["parameters"]
