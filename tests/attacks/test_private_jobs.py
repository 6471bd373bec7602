"""A stranger with a valid token looks for another user's private job on every way there is, and finds nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.service.api.access.auth import CALLBACK
from llmprune.service.api.access.route_scopes import scope_of
from llmprune.service.api.files.outputs import job_events
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.jobs.store import JobStore

NOBODYS = "0" * 12
NAME, MODEL, OWNER = "merger-of-two-banks", "org/unannounced", "anna.privately"
TEXT = RECIPE.replace("org/model", MODEL)
# What requests send that have a body; a new route with a {job} in its path needs its line here.
SENT: dict[str, dict[str, Any]] = {
    "/v1/jobs/{job}/notifications": {"json": {}},
    "/v1/models/{job}": {"json": {"stage": "retired"}},
    "/v1/jobs/{job}/follow-ups": {"json": {"work": {"kind": "repeat"}}},
    "/jobs/{job}/follow-ups": {"data": {"kind": "repeat"}},
    "/jobs/{job}/labels": {"data": {"stage": "retired"}},
    "/v1/jobs/{job}/push": {"json": {"repo_id": "org/x"}, "headers": {"X-Hub-Token": "hf_x"}},
    "/jobs/{job}/push": {"data": {"repo_id": "org/x", "hub_token": "hf_x"}},
}


class House:
    """A service with an admin, a user who has private jobs, and a stranger."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.harness = ServiceHarness(folder, gpus=("0",), burst=10_000, **changes)
        create = self.harness.service.tokens.create
        self.tokens = {"root": create("root", "admin"), OWNER: create(OWNER, "user"), "bob": create("bob", "user")}

    def ask(self, who: str, method: str, path: str, **request: Any) -> Any:
        """The answer to a user's request; redirections are not followed."""
        headers = {"Authorization": f"Bearer {self.tokens[who]}", "Accept": "text/html"} | request.pop("headers", {})
        return self.harness.http.request(method, path, headers=headers, follow_redirects=False, **request)

    def submit(self, who: str, text: str = TEXT, **params: Any) -> str:
        """A new job of a user."""
        answer = self.ask(who, "POST", "/v1/jobs", content=text, params={"name": NAME} | params, headers=YAML)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def run(self, job: str) -> str:
        """The job, once it has ended."""
        while not self.ask("root", "GET", f"/v1/jobs/{job}").json()["finished"]:
            self.harness.supervisor.round()
        return job


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, list[str]]]:
    """Private jobs in every state: finished, failed, pushed, running on the GPU and queued."""
    house = House(tmp_path_factory.mktemp("house"))
    done = house.run(house.submit(OWNER))
    failed = house.run(house.submit(OWNER, "# fake exit 1\n" + TEXT))
    push = house.ask(OWNER, "POST", f"/v1/jobs/{done}/push", **SENT["/v1/jobs/{job}/push"]).json()["id"]
    running = house.submit(OWNER, "# fake pause 60\n" + TEXT, gpus=1)
    queued = house.submit(OWNER, gpus=1)
    while house.ask("root", "GET", f"/v1/jobs/{running}").json()["total"] is None:
        house.harness.supervisor.round()
    house.run(push)
    yield house, [done, failed, push, running, queued]
    house.ask("root", "POST", f"/v1/jobs/{running}/cancel")
    house.run(running)


def routes_of(routed: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route, those that the API's description leaves out too."""
    for route in routed.routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router)
        else:
            yield from ((method, route.path) for method in route.methods - {"HEAD"})


def test_every_route_of_a_private_job_answers_as_if_there_were_none(house: tuple[House, list[str]]) -> None:
    """Status and text are those of an id that nobody has, for each method of each route with a job in its path."""
    service, (done, *_) = house
    routes = {(method, path) for method, path in routes_of(service.harness.app) if "{job}" in path}
    described = service.harness.app.openapi()["paths"]
    assert {path for path in described if "{job}" in path} <= {path.replace(":path", "") for _, path in routes}
    assert len(routes) >= 17
    for method, path in sorted(routes):
        answers = []
        for job in (done, NOBODYS):
            address = path.replace("{job}", job).replace("{name:path}", "report.json")
            answer = service.ask("bob", method, address, **SENT.get(path, {}))
            answers.append((answer.status_code, answer.text.replace(job, "JOB")))
        assert answers[0] == answers[1], (method, path)
        assert answers[0][0] == 404, (method, path)
        assert "there is no job" in answers[0][1], (method, path)
        if method == "GET" and not path.endswith("/events"):
            address = path.replace("{job}", done).replace("{name:path}", "report.json")
            assert service.ask(OWNER, method, address).status_code == 200, (method, path)


def test_jobs_named_in_a_query_are_not_there_either(house: tuple[House, list[str]]) -> None:
    """Comparing, starting from another job's recipe and the moving lines of the list find no private job."""
    service, jobs = house
    for job, path in itertools.product((*jobs, NOBODYS), ("/v1/compare?job=", "/compare?job=", "/submit?again=")):
        answer = service.ask("bob", "GET", path + job)
        assert (answer.status_code, f"there is no job {job!r}" in answer.text.replace("&#39;", "'")) == (404, True)
    moved = service.ask("bob", "GET", "/now?" + "&".join(f"job={job}" for job in jobs))
    assert moved.text == service.ask("bob", "GET", "/now").text
    assert f'id="job-{jobs[0]}"' in service.ask(OWNER, "GET", f"/now?job={jobs[0]}").text


def test_no_list_shows_a_private_job(house: tuple[House, list[str]]) -> None:
    """No answer to a stranger holds the id, name, model or owner of a private job, and no count counts it."""
    service, jobs = house
    paths = sorted(path for method, path in routes_of(service.harness.app) if method == "GET" and "{" not in path)
    assert {"/", "/now", "/compare", "/v1/jobs", "/v1/queue", "/v1/metrics"} <= set(paths)
    queries = [f"/v1/jobs?source={jobs[0]}", f"/v1/jobs?owner={OWNER}", "/v1/jobs?search=merger", "/?state=succeeded"]
    queries += [f"/v1/jobs?search={jobs[0]}", *(f"/v1/jobs?state={one}" for one in ("succeeded", "failed", "queued"))]
    others = (
        "/v1/compare",
        "/v1/compare.csv",
        "/v1/openapi.json",
        "/v1/ready",
        "/docs",
        "/docs/",
        "/login/oidc",
        CALLBACK,
    )  # the documentation knows no jobs
    paths = [path for path in paths if path not in others]
    for path in (*paths, *queries):
        answer = service.ask("bob", "GET", path)
        assert answer.status_code == (403 if scope_of("GET", path.split("?")[0]) == "admin" else 200), path
        assert [secret for secret in (NAME, MODEL, OWNER, *jobs) if secret in answer.text] == [], path
        if path.startswith("/v1/jobs"):
            found = answer.json()
            assert (found["jobs"], found["next"], set(found["counts"].values())) == ([], None, {0}), path
    for path in ("/", "/compare", "/v1/jobs"):  # they do show them to those who may read them
        for who in (OWNER, "root"):
            assert jobs[0] in service.ask(who, "GET", path).text, (who, path)


def test_a_busy_device_names_no_private_job(house: tuple[House, list[str]]) -> None:
    """That a GPU is busy is everybody's to know; which job holds it is not."""
    service, (_, _, _, running, _) = house
    assert service.ask("bob", "GET", "/v1/queue").json()["devices"] == [{"name": "0", "busy": True, "job": None}]
    assert service.ask(OWNER, "GET", "/v1/queue").json()["devices"][0]["job"] == running
    assert "GPU 0 busy" in service.ask("bob", "GET", "/").text


def test_a_shared_job_is_read_by_all_and_changed_by_its_owner(house: tuple[House, list[str]]) -> None:
    """It is in the lists and counts of others, its files can be had, and who changes or pushes it gets 403."""
    service, private = house
    shared = service.submit(OWNER, recipe(n="shared"), shared=True, gpus=0)
    answer = service.ask("bob", "GET", "/v1/jobs").json()
    assert [job["id"] for job in answer["jobs"]] == [shared]
    assert (answer["jobs"][0]["shared"], answer["counts"]["queued"]) == (True, 1)
    own = service.submit("bob", recipe(n="own"), gpus=0)
    listed = service.ask("bob", "GET", "/v1/jobs", params={"limit": 1}).json()
    assert [job["id"] for job in listed["jobs"]] == [own]
    after = service.ask("bob", "GET", "/v1/jobs", params={"before": listed["next"]}).json()
    assert [job["id"] for job in after["jobs"]] == [shared]
    service.run(shared)
    for path in ("", "/log", "/artifacts", "/artifacts/report.json", "/report", "/report.html", "/events"):
        assert service.ask("bob", "GET", f"/v1/jobs/{shared}{path}").status_code == 200, path
    for method, path in (
        ("POST", "cancel"),
        ("POST", "retry"),
        ("POST", "reevaluate"),
        ("POST", "push"),
        ("POST", "share"),
        ("POST", "unshare"),
        ("DELETE", ""),
    ):
        answer = service.ask("bob", method, f"/v1/jobs/{shared}/{path}".rstrip("/"), **SENT["/v1/jobs/{job}/push"])
        assert (answer.status_code, "belongs to" in answer.text) == (403, True), path
    for job in (shared, own):
        service.run(job)
        assert service.ask("root", "DELETE", f"/v1/jobs/{job}").status_code == 204
    assert service.ask("bob", "GET", f"/jobs/{private[0]}").status_code == 404


def test_a_service_that_shares_all_jobs(tmp_path: Path) -> None:
    """With ``serve --share-jobs`` everybody with a token reads every job, as if each had been submitted as shared."""
    service = House(tmp_path, share_jobs=True)
    job = service.submit(OWNER)
    assert service.ask("bob", "GET", f"/v1/jobs/{job}").json()["shared"] is False
    assert service.ask("bob", "GET", "/v1/jobs").json()["counts"]["queued"] == 1
    assert service.ask("bob", "POST", f"/v1/jobs/{job}/cancel").status_code == 403


def test_the_form_shares_a_job_only_where_it_is_ticked(tmp_path: Path) -> None:
    """The browser's form makes private jobs, unless the box is ticked."""
    service = House(tmp_path)
    assert 'name="shared"' in service.ask("bob", "GET", "/submit").text
    for sent, shared in (({}, False), ({"shared": "on"}, True)):
        answer = service.ask("bob", "POST", "/submit", data={"recipe": recipe(n=shared)} | sent)
        job = answer.headers["Location"].removeprefix("/jobs/")
        assert service.ask("bob", "GET", f"/v1/jobs/{job}").json()["shared"] is shared


def test_an_admins_push_of_a_job_is_not_named_to_its_owner(tmp_path: Path) -> None:
    """Why the job cannot be deleted meanwhile is said without the id of a job that the owner may not read."""
    service = House(tmp_path)
    job = service.run(service.submit(OWNER))
    push = service.ask("root", "POST", f"/v1/jobs/{job}/push", **SENT["/v1/jobs/{job}/push"]).json()["id"]
    refused = service.ask(OWNER, "DELETE", f"/v1/jobs/{job}", headers={"Accept": "application/json"})
    assert (refused.status_code, "a job of another user reads" in refused.text) == (409, True)
    assert push not in refused.text + service.ask(OWNER, "GET", f"/jobs/{job}").text
    assert service.ask(OWNER, "GET", f"/v1/jobs/{push}").status_code == 404


@pytest.mark.parametrize(
    "loss",
    [
        f"DELETE FROM jobs WHERE owner = '{OWNER}'",
        f"DELETE FROM tokens WHERE owner = '{OWNER}'",
        "UPDATE users SET disabled = 1",
    ],
)
def test_a_stream_ends_with_its_job_or_token(tmp_path: Path, loss: str) -> None:
    """Who follows a job hears nothing more once the job is gone, the token is revoked or the user disabled."""
    service = House(tmp_path)
    job = service.submit(OWNER)
    caller = service.harness.service.tokens.caller(service.tokens[OWNER])
    assert caller is not None

    async def follow() -> list[str]:
        heard = []
        async for event in job_events(job, service.harness.service, caller=caller, last_event_id=None):
            heard.append(json.loads(str(event.raw_data))["state"])
            with service.harness.service.database.write() as connection:
                connection.execute(loss)
        return heard

    assert asyncio.run(asyncio.wait_for(follow(), 10)) == ["queued"]


def test_jobs_from_before_are_private(tmp_path: Path) -> None:
    """The migration leaves every job that is there to its owner."""
    path = tmp_path / "service.sqlite3"
    migrations = sorted(files("llmprune.service.database").joinpath("migrations").iterdir(), key=lambda file: file.name)
    with sqlite3.connect(path) as connection:
        for step in migrations[:4]:
            connection.executescript(step.read_text(encoding="utf-8"))
        connection.execute("PRAGMA user_version = 4")
        names = "id, owner, name, model, recipe, overrides, launcher, gpus, priority, state, created"
        values = f"'{NOBODYS}', '{OWNER}', 'n', 'm', '', '[]', 'local', 0, 0, 'queued', 0"
        connection.execute(f"INSERT INTO jobs ({names}) VALUES ({values})")
    database = SqliteDatabase(path)
    database.migrate()
    found = JobStore(database).get(NOBODYS)
    assert found is not None
    assert found.shared is False
