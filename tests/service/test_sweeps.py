"""Sweeps and comparisons: which jobs a sweep makes, that it makes all or none, and figures next to each other."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest
from helpers.finished import finished, report_json
from helpers.service import RECIPE, YAML, ServiceHarness

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.job import Outcome, figures_of
from llmprune.service.jobs.sharing import transfer
from llmprune.service.jobs.sweeps.axes import Axis, axis_of, describe_point, points_of, split_values

PAGE = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with an admin and two users."""
    return ServiceHarness(tmp_path_factory.mktemp("sweeps"), rate=1e6, burst=10**6)


def sweep(harness: ServiceHarness, *vary: str, headers: dict[str, str] | None = None, **params: Any) -> Any:
    """Submit a sweep and return the answer."""
    params |= {"vary": list(vary)}
    return harness.http.post("/v1/sweeps", content=RECIPE, params=params, headers=YAML | (headers or {}))


def waiting(harness: ServiceHarness) -> int:
    """Return the number of queued jobs."""
    return harness.service.jobs.counts(viewer=None)["queued"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.9, 0.8", ["0.9", "0.8"]),
        ("[1, 2], [3]", ["[1, 2]", "[3]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("{a: [1, 2]},{}", ["{a: [1, 2]}", "{}"]),
        ("1", ["1"]),
    ],
)
def test_commas_in_brackets_and_quotes_belong_to_a_value(text: str, values: list[str]) -> None:
    """Lists, mappings and quoted texts can be values of a sweep."""
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["depth.remove"], "give KEY=VALUE"),
        (["Depth=1,2"], "no key of a recipe"),
        (["depth.remove=1,"], "a value is missing"),
        (["depth.remove=1"], "two values or more"),
        (["depth.remove=1,1"], "two values or more"),
        (["depth.remove=1,2", "depth.remove=3,4"], "given twice"),
        (["a=" + ",".join(map(str, range(51)))], "51 combinations"),
        ([f"{key}=1,2" for key in "abcde"], "5 keys"),
    ],
)
def test_a_sweep_has_limits(axes: list[str], said: str) -> None:
    """A wrong or too large sweep is refused with the limit and the remedy."""
    with pytest.raises(RecipeError, match=said):
        points_of([axis_of(text) for text in axes])


def test_points_are_named_by_what_differs() -> None:
    """The last part of a key is its name, the whole key where two would have the same."""
    axes = [Axis(key="depth.criterion", values=("a",)), Axis(key="width.mlp", values=("1",))]
    assert describe_point(axes, ("a", "0.5")) == "criterion a, mlp 0.5"
    axes[1] = Axis(key="width.criterion", values=("b",))
    assert describe_point(axes, ("a", "b")) == "depth.criterion a, width.criterion b"


def test_a_sweep_queues_every_combination_once(harness: ServiceHarness) -> None:
    """Jobs have their own values and one name; the same key gives the same sweep, another request a conflict."""
    key = {"Idempotency-Key": "mine"}
    axes = ("depth.remove=1,2", "calibration.samples=8,16")
    answer = sweep(harness, *axes, headers=key, name="Both", set="calibration.sequence_length=64")
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert [one["point"] for one in made["jobs"]] == [["1", "8"], ["1", "16"], ["2", "8"], ["2", "16"]]
    job = harness.job(made["jobs"][3]["job"]["id"])
    overrides = ["calibration.sequence_length=64", "depth.remove=2", "calibration.samples=16"]
    assert (job["name"], job["overrides"]) == ("Both: remove 2, samples 16", overrides)
    again = sweep(harness, *axes, headers=key, name="Both", set="calibration.sequence_length=64")
    assert (again.json()["id"], again.headers["Idempotent-Replay"]) == (made["id"], "true")
    assert sweep(harness, axes[0], headers=key).status_code == 409
    assert waiting(harness) == 4
    assert harness.http.post(f"/v1/sweeps/{made['id']}/cancel").json() == {"cancelled": 4}
    assert {one["job"]["state"] for one in harness.http.get(f"/v1/sweeps/{made['id']}").json()["jobs"]} == {"cancelled"}
    assert harness.http.get("/v1/sweeps").json()[0]["name"] == "Both"


def test_one_wrong_point_queues_nothing(harness: ServiceHarness) -> None:
    """Problems name their point, once where it is all of them; nothing is left of a sweep that is refused."""
    folders, jobs = sorted(harness.settings.data_dir.glob("jobs/*")), waiting(harness)
    answer = sweep(harness, "depth.remove=1,-2", headers={"X-Hub-Token": "hf_a"})
    assert (answer.status_code, len(answer.json()["problems"])) == (422, 1)
    assert answer.json()["problems"][0].startswith("remove -2: ")
    everywhere = sweep(harness, "depth.remove=1,2", set="calibration.samples=-1").json()["problems"]
    assert [problem.startswith("remove") for problem in everywhere] == [False]
    full = replace(harness.service, settings=harness.settings.model_copy(update={"max_queued": jobs + 1}))
    harness.app.state.service = full
    refused = sweep(harness, "depth.remove=1,2", headers={"X-Hub-Token": "hf_a"})
    harness.app.state.service = harness.service
    assert refused.status_code == 429
    assert waiting(harness) == jobs
    assert sorted(harness.settings.data_dir.glob("jobs/*")) == folders


def test_the_page_of_a_sweep_compares_what_has_finished(harness: ServiceHarness) -> None:
    """The form makes a sweep; its page has the finished jobs in the chart, the others with their state."""
    form = {"recipe": RECIPE, "key_0": "depth.remove", "values_0": "1, 2", "key": "k" * 20, "key_2": "", "values_2": ""}
    checked = harness.http.post("/submit/sweep", data=form, headers=PAGE).text
    assert "Makes 2 jobs." in checked
    assert "Not yet a sweep" in harness.http.post("/submit/sweep", data=form | {"values_0": "1"}, headers=PAGE).text
    wrong = harness.http.post("/sweep", data=form | {"values_0": "1, x"}, headers=PAGE)
    assert (wrong.status_code, 'value="1, x"' in wrong.text) == (422, True)
    made = harness.http.post("/sweep", data=form, headers=PAGE, follow_redirects=False)
    assert (
        made.headers["Location"]
        == harness.http.post("/sweep", data=form, headers=PAGE, follow_redirects=False).headers["Location"]
    )
    page = made.headers["Location"]
    first, _ = (one["job"]["id"] for one in harness.http.get(f"/v1{page}").json()["jobs"])
    harness.service.jobs.start(first, [])
    figures = figures_of(report_json()).model_dump_json()
    harness.service.jobs.end(first, Outcome("succeeded", 0, results={"figures": figures}))
    text = harness.http.get(page, headers=PAGE).text
    assert "1 of 2 jobs finished, 1 waiting." in text
    assert "no result yet" in text
    assert "<svg" in text
    assert f'href="{page}"' in harness.http.get(f"/jobs/{first}", headers=PAGE).text
    harness.http.post(f"{page}/cancel", headers=PAGE)
    assert waiting(harness) == 0
    assert "hx-trigger" not in harness.http.get(f"{page}/now", headers=PAGE).text


def test_a_new_job_becomes_a_sweep(harness: ServiceHarness) -> None:
    """What was typed is taken along, with values around the recipe's own size; what is not, is named."""
    assert 'formaction="/sweep/new"' in harness.http.get("/submit", headers=PAGE).text
    form = {"recipe": "# mine\n" + RECIPE, "name": "Mine", "launcher": "torchrun", "minutes": "5", "key": "k"}
    text = harness.http.post("/sweep/new", data=form, headers=PAGE).text
    for part in ("# mine", 'value="Mine"', 'value="depth.remove"', 'value="1, 2, 3"', "Runs on, Maximum minutes"):
        assert part in text
    for recipe, row in (
        ("budget: {parameters: 0.5}", "0.9, 0.8, 0.7"),
        ("width: {mlp: 0.5}", "width.mlp"),
        (": [", ""),
    ):
        assert f'value="{row}"' in harness.http.post("/sweep/new", data={"recipe": recipe}, headers=PAGE).text


def test_a_comparison_warns_and_shows_where_recipes_differ(harness: ServiceHarness) -> None:
    """Another base and another setting are warnings; keys that differ stand side by side, on the page and in JSON."""
    other = report_json()
    other["provenance"]["model"] = "org/other"
    other["recipe"] = {"depth": {"remove": 2}, "evaluation": {"limit": 7}}
    mine = report_json(recipe={"depth": {"remove": 1}, "evaluation": {"limit": 7}})
    jobs = [finished(harness, "mine", mine), finished(harness, "other", other)]
    found = harness.http.get("/v1/compare", params={"job": jobs}).json()
    assert found["warnings"] == ["the runs prune different models"]
    assert found["recipe"] == [{"key": "depth.remove", "values": ["1", "2"]}]
    assert [one["disk"] for one in found["jobs"]] == [81, 81]
    text = harness.http.get("/compare", params={"job": jobs}, headers=PAGE).text
    assert "The runs prune different models." in text
    assert "depth.remove" in text
    (harness.run_folder(jobs[1]) / "report.json").write_text("{")
    (warning,) = harness.http.get("/v1/compare", params={"job": jobs}).json()["warnings"]
    assert "other" in warning


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", " =1", '=HYPERLINK("//x","y")'])
def test_csv_has_units_and_no_formula(harness: ServiceHarness, evil: str) -> None:
    """Every text that a spreadsheet would run begins with an apostrophe; numbers stay numbers."""
    job = finished(harness, "safe")
    notes = {"notes": evil.strip() if evil != "\t=1" else evil}
    assert harness.http.patch(f"/v1/models/{job}", json=notes).status_code == 200
    with harness.service.database.write() as connection:
        connection.execute("UPDATE jobs SET name = ? WHERE id = ?", (evil, job))
    answer = harness.http.get("/v1/compare.csv", params={"job": job})
    assert answer.headers["Content-Disposition"].startswith("attachment")
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert (row["name"], row["notes"][:1]) == (f"'{evil}", "'")
    assert (row["weights dense (bytes)"], row["retention (1 = dense)"]) == ("269030016", "0.9483")


def test_sweeps_of_others_do_not_exist(harness: ServiceHarness) -> None:
    """A private sweep is found by its owner and admins; a shared one by all, who do not cancel it."""
    tokens = {name: harness.service.tokens.create(name, role) for name, role in
              (("root", "admin"), ("ann", "user"), ("bob", "user"))}  # fmt: skip
    headers = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}
    private = sweep(harness, "depth.remove=1,2", headers=headers["ann"]).json()["id"]
    public = sweep(harness, "depth.remove=1,2", headers=headers["ann"], shared=True).json()["id"]
    for who, seen in (("ann", 200), ("bob", 404), ("root", 200)):
        assert harness.http.get(f"/v1/sweeps/{private}", headers=headers[who]).status_code == seen
        assert harness.http.get(f"/sweeps/{private}", headers=headers[who] | PAGE).status_code == seen
    assert [one["id"] for one in harness.http.get("/v1/sweeps", headers=headers["bob"]).json()] == [public]
    assert harness.http.post(f"/v1/sweeps/{private}/cancel", headers=headers["bob"]).status_code == 404
    assert harness.http.post(f"/sweeps/{public}/cancel", headers=headers["bob"]).status_code == 403
    jobs = [one["job"]["id"] for one in harness.http.get(f"/v1/sweeps/{public}", headers=headers["ann"]).json()["jobs"]]
    assert harness.http.post(f"/v1/jobs/{jobs[0]}/unshare", headers=headers["ann"]).status_code == 200
    seen_by_bob = harness.http.get(f"/v1/sweeps/{public}", headers=headers["bob"]).json()["jobs"]
    assert [one["job"]["id"] for one in seen_by_bob] == jobs[1:]
    assert harness.http.post(f"/v1/sweeps/{public}/cancel", headers=headers["root"]).json() == {"cancelled": 2}
    transfer(harness.service.database, "ann", to="bob")
    assert len(harness.http.get(f"/v1/sweeps/{private}", headers=headers["bob"]).json()["jobs"]) == 2
    assert harness.http.get(f"/v1/sweeps/{private}", headers=headers["ann"]).status_code == 404
