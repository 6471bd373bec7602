"""The model library: lists in every order, labels and their history, links, and who may see and change what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.finished import finished, report_json
from helpers.service import RECIPE, ServiceHarness

from llmprune.service.jobs.library.library import Library
from llmprune.service.jobs.library.model_rows import kept_models
from llmprune.service.jobs.library.models import ModelQuery, Sort

PAGE = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service without tokens that has models with equal, different and missing figures."""
    made = ServiceHarness(tmp_path_factory.mktemp("models"), rate=1e6, burst=10**6)
    plain = report_json()
    for name, retention, speed in (("b", 0.9, plain["speed"]), ("A", 0.9, None), ("c", None, None), ("d", 0.7, None)):
        finished(made, name, report_json(mean_retention=retention, speed=speed, retention=None))
    return made


@pytest.fixture(scope="module")
def shared_by(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServiceHarness, dict[str, dict[str, str]]]:
    """A service with an admin and two users, and their headers."""
    made = ServiceHarness(tmp_path_factory.mktemp("users"), rate=1e6, burst=10**6)
    tokens = {name: made.service.tokens.create(name, role) for name, role in
              (("root", "admin"), ("ann", "user"), ("bob", "user"))}  # fmt: skip
    return made, {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}


def names(harness: ServiceHarness, **query: Any) -> list[str]:
    """Return the names of the models that the API lists."""
    answer = harness.http.get("/v1/models", params=query)
    assert answer.status_code == 200, answer.text
    return [model["name"] for model in answer.json()["models"]]


def label(harness: ServiceHarness, job: str, headers: dict[str, str] | None = None, **labels: Any) -> int:
    """Change labels over HTTP and return the status."""
    return harness.http.patch(f"/v1/models/{job}", json=labels, headers=headers or {}).status_code


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("sort", get_args(Sort))
def test_pages_have_every_model_once_in_every_order(harness: ServiceHarness, sort: Sort, order: Any) -> None:
    """Pages of two have what one page has, for equal keys too."""
    library, query = Library(harness.service.database), ModelQuery(None, sort=sort, order=order, limit=2)
    whole = [model.id for model in library.page(replace(query, limit=100)).models]
    seen: list[str] = []
    after = None
    while True:
        page = library.page(replace(query, after=after))
        seen += [model.id for model in page.models]
        if (after := page.next) is None:
            break
    assert seen == whole
    assert len(set(seen)) == len(seen) >= 4


def test_models_are_sorted_by_figures_and_found_by_words(harness: ServiceHarness) -> None:
    """Figures that were not measured come last; a search looks in name, base, tags and notes, and knows no wildcard."""
    assert names(harness, sort="retention", limit=4)[2:] == ["d", "c"]
    assert names(harness, sort="name", order="asc", limit=4) == ["A", "b", "c", "d"]
    (job,) = [one["id"] for one in harness.http.get("/v1/models", params={"search": "a org/model"}).json()["models"]
              if one["name"] == "A"]  # fmt: skip
    assert label(harness, job, add_tags=["Best", "code/1"], notes="Ships at 100 %, in May") == 200
    for search in ("best", "code/1 a", "SHIPS may", "100 %", job):
        assert names(harness, search=search) == ["A"], search
    assert names(harness, search="%") == ["A"]
    assert names(harness, search="_") == []
    assert names(harness, tag="best", stage="candidate", base="org/model", owner="local") == ["A"]
    assert names(harness, tag="nothing") == names(harness, stage="retired") == names(harness, base="b") == []
    for wrong in ("x", "W10", "WyJhIiwgMV0"):
        assert harness.http.get("/v1/models", params={"after": wrong}).status_code == 404


def test_a_change_of_labels_is_one_event_and_no_change_is_none(harness: ServiceHarness) -> None:
    """The history says who changed what; the report stays as it is, and the page of a retired model says so."""
    job = finished(harness, "labelled")
    before = (harness.run_folder(job) / "report.json").read_bytes()
    assert label(harness, job, stage="retired", tags=["old", "new"], notes="see the other") == 200
    assert label(harness, job, stage="retired", remove_tags=["old"]) == 200
    assert label(harness, job, stage="retired", tags=["new"]) == 200
    history = Library(harness.service.database).history(job)
    assert [event.data["changes"] for event in history if event.kind == "labels"] == [
        {"removed": ["old"]},
        {"stage": "retired", "added": ["new", "old"], "notes": "changed"},
    ]
    text = harness.http.get(f"/jobs/{job}", headers=PAGE).text
    assert "This model is retired." in text
    assert "local: tags removed: old" in text
    assert (harness.run_folder(job) / "report.json").read_bytes() == before
    assert harness.job(job)["state"] == "succeeded"


@pytest.mark.parametrize(
    "labels",
    [
        {"stage": "best"},
        {"tags": ["two words"]},
        {"add_tags": ["<b>"]},
        {"add_tags": ["x" * 41]},
        {"tags": [str(number) for number in range(21)]},
        {"notes": "x" * 4001},
        {"colour": "red"},
    ],
)
def test_labels_have_limits(harness: ServiceHarness, labels: dict[str, Any]) -> None:
    """A wrong label is refused whole, with the reason."""
    (job, *_) = [one["id"] for one in harness.http.get("/v1/models").json()["models"]]
    before = harness.http.get(f"/v1/models/{job}").json()
    answer = harness.http.patch(f"/v1/models/{job}", json={"notes": "changed"} | labels)
    assert (answer.status_code, bool(answer.json()["problems"])) == (422, True)
    assert harness.http.get(f"/v1/models/{job}").json() == before


def test_a_job_without_a_result_is_no_model(harness: ServiceHarness) -> None:
    """A waiting job is not in the library and has no labels; a model leaves it with its job."""
    waiting = harness.submit()["id"]
    assert harness.http.get(f"/v1/models/{waiting}").status_code == 404
    assert label(harness, waiting, stage="approved") == 409
    gone = finished(harness, "gone")
    assert label(harness, gone, tags=["gone"]) == 200
    harness.http.delete(f"/v1/jobs/{gone}")
    assert names(harness, tag="gone") == []
    assert "gone" not in Library(harness.service.database).choices(None).tags


def test_others_see_shared_models_and_change_none(
    shared_by: tuple[ServiceHarness, dict[str, dict[str, str]]],
) -> None:
    """A private model does not exist for others, in lists and suggestions too; only owner and admins label."""
    harness, headers = shared_by
    secret = finished(harness, "secret", headers=headers["ann"])
    public = finished(harness, "public", headers=headers["ann"], shared=True)
    assert label(harness, secret, headers["ann"], tags=["covert"]) == 200

    def seen(who: str) -> list[str]:
        found = harness.http.get("/v1/models", params={"sort": "name"}, headers=headers[who]).json()["models"]
        return sorted(model["name"] for model in found)

    assert (seen("ann"), seen("bob"), seen("root")) == (["public", "secret"], ["public"], ["public", "secret"])
    assert (label(harness, secret, headers["bob"], stage="retired"), label(harness, public, headers["bob"])) == (
        404,
        403,
    )
    assert label(harness, public, headers["root"], stage="approved") == 200
    for path in ("/models", "/models/choices"):
        page = {who: harness.http.get(path, headers=PAGE | headers[who]).text for who in ("ann", "bob")}
        assert ("covert" in page["ann"], "covert" in page["bob"]) == (True, False)
    for path in (
        f"/jobs/{secret}",
        f"/compare?job={secret}",
        f"/v1/compare?job={secret}",
        f"/v1/compare.csv?job={secret}",
    ):
        assert harness.http.get(path, headers=PAGE | headers["bob"]).status_code == 404
    form = {"job": [public, secret], "do": "tag", "tags": "mine", "back": "/models"}
    assert harness.http.post("/models/label", data=form, headers=PAGE | headers["bob"]).status_code in (403, 404)
    assert harness.http.get(f"/v1/models/{public}", headers=headers["bob"]).json()["tags"] == []
    form = {"job": [public], "sure": "yes", "back": "/models"}
    assert harness.http.post("/models/delete", data=form, headers=PAGE | headers["bob"]).status_code == 403


def test_only_approvers_approve(shared_by: tuple[ServiceHarness, dict[str, dict[str, str]]]) -> None:
    """They set the stage of models that they may read, and change nothing else of others; owners may withdraw it."""
    harness, headers = shared_by
    headers = headers | {"eve": {"Authorization": f"Bearer {harness.service.tokens.create('eve', 'approver')}"}}
    headers["only"] = {
        "Authorization": f"Bearer {harness.service.tokens.create('eve', name='only', scopes=['read', 'approve'])}"
    }
    secret, public = (finished(harness, "to ship", headers=headers["ann"], shared=shared) for shared in (False, True))
    assert label(harness, public, headers["ann"], stage="approved") == 403
    assert label(harness, secret, headers["eve"], stage="approved") == 404
    assert label(harness, public, headers["eve"], stage="approved", notes="mine") == 403
    assert label(harness, public, headers["only"], stage="approved") == 200
    form = {"stage": "approved", "tags": "best", "notes": ""}  # the form of the page has the stage as it is
    saved = harness.http.post(
        f"/jobs/{public}/labels", data=form, headers=PAGE | headers["ann"], follow_redirects=False
    )
    assert saved.status_code == 303
    assert harness.http.get(f"/v1/models/{public}", headers=headers["bob"]).json()["tags"] == ["best"]
    assert label(harness, public, headers["ann"], stage="retired") == 200
    refused = harness.http.patch(f"/v1/models/{public}", json={"stage": "approved"}, headers=headers["ann"])
    assert "only approvers and admins" in refused.json()["detail"]


def test_ticked_models_are_labelled_and_deleted(harness: ServiceHarness) -> None:
    """The form changes every ticked model and returns to the list; it deletes only after a second question."""
    jobs = [finished(harness, f"ticked {number}") for number in range(2)]
    form = {"job": jobs, "back": "/models?search=ticked"}
    answer = harness.http.post("/models/label", data=form | {"do": "tag", "tags": "one, two"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/models?search=ticked")
    harness.http.post("/models/label", data=form | {"do": "untag", "tags": "two"})
    harness.http.post("/models/label", data=form | {"do": "stage", "to_stage": "approved"})
    found = [harness.http.get(f"/v1/models/{job}").json() for job in jobs]
    assert [(one["stage"], one["tags"]) for one in found] == [("approved", ["one"])] * 2
    assert set(jobs) <= kept_models(harness.service.database)
    for wrong in (
        {"do": "tag", "tags": ""},
        {"do": "stage", "to_stage": "best"},
        {"do": "tag", "tags": "a", "back": "//x"},
    ):
        assert harness.http.post("/models/label", data=form | wrong).status_code == 422
    asked = harness.http.post("/models/delete", data=form, headers=PAGE).text
    assert "Delete 2 models?" in asked
    assert harness.run_folder(jobs[0]).is_dir()
    harness.http.post("/models/delete", data=form | {"sure": "yes"})
    assert names(harness, search="ticked") == []
    assert not harness.run_folder(jobs[0]).exists()


def test_results_of_an_earlier_version_are_added(harness: ServiceHarness) -> None:
    """Jobs without a row in the library get one when the service starts, and rows that exist keep their labels."""
    kept, lost = finished(harness, "kept"), finished(harness, "lost")
    assert label(harness, kept, tags=["kept"]) == 200
    with harness.service.database.write() as connection:
        connection.execute("DELETE FROM models WHERE job = ?", (lost,))
    Library(harness.service.database).complete()
    found = {job: harness.http.get(f"/v1/models/{job}").json() for job in (kept, lost)}
    assert (found[kept]["tags"], found[lost]["stage"]) == (["kept"], "candidate")


def test_a_page_links_what_a_model_was_made_from_and_what_was_made_of_it(harness: ServiceHarness) -> None:
    """The base of a job that pruned a model made here is a link, and so are the jobs that use a model."""
    base = finished(harness, "the base")
    folder = str(harness.run_folder(base) / "model")
    derived, follow_up = finished(harness, "pruned again"), finished(harness, "more samples")
    with harness.service.database.write() as connection:
        connection.execute("UPDATE jobs SET model = ? WHERE id = ?", (folder, derived))
        connection.execute("UPDATE jobs SET made_from = ? WHERE id = ?", (base, follow_up))
    of_base, of_derived, of_follow_up = (
        harness.http.get(f"/jobs/{job}", headers=PAGE).text for job in (base, derived, follow_up)
    )
    assert f'href="/jobs/{derived}"' in of_base
    assert f'href="/jobs/{follow_up}"' in of_base
    assert f'href="/jobs/{base}"' in of_derived
    assert f'href="/jobs/{base}"' in of_follow_up


def test_what_people_write_on_models_is_text(tmp_path: Path) -> None:
    """Markup in a name, in notes and in a filter is shown as text, and an empty library says what to do."""
    made = ServiceHarness(tmp_path)
    assert "llmprune upload" in made.http.get("/models", headers=PAGE).text
    evil = "<img src=x onerror=alert(1)>\"'"
    job = finished(made, evil, text=f"# {evil}\n{RECIPE}")
    assert label(made, job, notes=evil) == 200
    for path in ("/models", f"/models?search={evil}", f"/models?base={evil}", f"/jobs/{job}", f"/sweep?again={job}"):
        answer = made.http.get(path, headers=PAGE)
        assert (answer.status_code, "<img" in answer.text) == (200, False), path
