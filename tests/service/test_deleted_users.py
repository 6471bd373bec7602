"""Deletion of users: what ends, what is handed over, who may not be deleted, and who comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.people import People
from helpers.service import RECIPE, recipe
from typer.main import get_command

from llmprune.cli.main import app as command_line
from llmprune.common.errors import AccessDenied, NotFound, RecipeError, StateConflict
from llmprune.service.jobs.drafts import Draft, Drafts
from llmprune.service.jobs.job import JobRequest, NewJob
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.users.deleted_users import delete_user
from llmprune.service.users.quotas import Quotas

HTML = {"Accept": "text/html"}
FILES = ("report.json", "model/config.json", "model/model.safetensors")


@pytest.fixture
def people(tmp_path: Path) -> People:
    """A service whose admin is root."""
    made = People(tmp_path)
    made.client("root", "admin")
    return made


def test_what_a_deleted_user_leaves(people: People) -> None:
    """The new owner has the jobs, and one runs on; token, session, draft and upload end; no row names the user."""
    ann, bob, root = people.client("ann"), people.client("bob"), people.client("root")
    done, runs = ann.submit(RECIPE, key="k"), ann.submit(recipe(pause=60), notify_urls=["https://example.org/hook"])
    while people.harness.supervisor.round() or done.refresh().state != "succeeded":
        pass
    assert runs.refresh().state == "running"
    sweep = ann.submit_sweep(RECIPE, vary={"depth.remove": [1, 2]}, key="s")
    ann.set_notifications(urls=["https://example.org/hook"])
    Drafts(people.database).save("ann", Draft("half a recipe"))
    files = [{"name": name, "bytes": 1, "sha256": "0" * 64} for name in FILES]
    headers = {"Authorization": f"Bearer {people.tokens['ann']}"}
    upload = people.harness.http.post("/v1/models/uploads", json={"files": files}, headers=headers).json()["id"]
    session = people.service.sessions.open_with(people.tokens["ann"])
    root.set_quotas("ann", running=3)
    with pytest.raises(RecipeError, match=r"ann has 4 jobs and 1 sweep, with their models .* --hand-over-to NAME"):
        root.delete_user("ann")
    assert people.service.users.find("ann") is not None
    assert root.delete_user("ann", hand_over_to="bob") == 4
    assert people.rows("ann") == {}
    assert people.service.sessions.caller(session) is None
    with pytest.raises(AccessDenied):
        ann.account()
    assert not (people.harness.settings.folder(upload)).exists()
    assert {job.id for job in bob.jobs()} == {done.id, runs.id, *(one.job.id for one in sweep.jobs)}
    assert [model.owner for model in bob.models()] == ["bob"]
    assert bob.sweep(sweep.id).owner == "bob"
    people.harness.supervisor.round()
    assert bob.job(runs.id).state == "running"
    assert "owner" in [event["kind"] for event in people.service.jobs.events(runs.id, 0)]
    assert bob.job(done.id).artifacts()
    bob.job(runs.id).cancel()
    while people.harness.supervisor.round() or not bob.job(runs.id).shown.ended:
        pass
    with pytest.raises(Conflict, match="the user ann was deleted"):  # a request that was under way
        people.service.jobs.add("f" * 12, NewJob("ann", "m", RECIPE, (), JobRequest(name="late")), quotas=Quotas())
    root.create_user("ann")  # another person of this name gets nothing of the first
    again = people.harness.client()
    again.connection.http.headers["Authorization"] = f"Bearer {root.make_user_token('ann')}"
    assert [*again.jobs()] == []
    assert again.submit(RECIPE, key="k").id != done.id


def test_who_is_not_deleted(people: People) -> None:
    """Unknown users, oneself and the last admin are not; a new owner who is unknown or disabled gets nothing."""
    ann, root = people.client("ann"), people.client("root")
    job = ann.submit(RECIPE)
    people.client("off")
    people.service.users.disable("off")
    for new_owner in ("nobody", "off", "ann"):
        with pytest.raises(RecipeError, match=r"no user '\w+' who may have jobs|belong to ann already"):
            root.delete_user("ann", hand_over_to=new_owner)
    assert job.refresh().owner == "ann"
    with pytest.raises(NotFound, match="there is no user 'nobody'"):
        root.delete_user("nobody")
    with pytest.raises(StateConflict, match="this is your own account"):
        root.delete_user("root")
    with pytest.raises(AccessDenied, match="the role user may not"):
        ann.delete_user("bob")
    people.client("second", "admin").delete_user("root")
    with pytest.raises(RecipeError, match="second is the last admin"):
        people.service.users.set_role("second", "user")


def test_the_page_asks_first(people: People) -> None:
    """The page names what there is to hand over; a deletion without a new owner, or of oneself, is refused on it."""
    people.client("ann").submit(RECIPE)
    people.client("bob")
    headers = {"Authorization": f"Bearer {people.tokens['root']}"} | HTML
    ask = people.harness.http
    assert "/users/ann/delete" in ask.get("/users/ann", headers=headers).text
    page = ask.get("/users/ann/delete", headers=headers).text
    assert ("New owner of 1 job" in page, "<option>bob</option>" in page) == (True, True)
    refused = ask.post("/users/ann/delete", headers=headers)
    assert (refused.status_code, "ann has 1 job, with" in refused.text) == (422, True)
    assert "lock you out" in ask.get("/users/root/delete", headers=headers).text
    assert ask.post("/users/root/delete", headers=headers).status_code == 409
    done = ask.post("/users/ann/delete", data={"hand_over_to": "bob"}, headers=headers, follow_redirects=False)
    assert (done.status_code, done.headers["Location"]) == (303, "/users")
    for method in ("GET", "POST"):
        assert ask.request(method, "/users/ann/delete", headers=headers).status_code == 404


def test_the_command(tmp_path: Path) -> None:
    """It deletes, hands over, refuses the last admin and options of other actions, and is in the audit log."""

    def run(*arguments: str) -> Any:
        url = people.harness.settings.database_url
        place = ["--data-dir", str(tmp_path / "data"), *(["--database", url] if url else [])]
        return CliRunner().invoke(command, ["user", *arguments, *place])

    command = get_command(command_line)
    people = People(tmp_path)
    root, ann = people.client("root", "admin"), people.client("ann")
    ann.submit(RECIPE)
    for words, said in (
        (("delete", "ann"), "ann has 1 job, with"),
        (("delete", "ann", "--to", "root"), "has no --to; its options: --hand-over-to"),
        (("delete",), "needs a name"),
        (("delete", "ann", "--name", "bob"), "two names"),
        (("delete", "nobody"), "there is no user 'nobody'"),
        (("delete", "root"), "root is the last admin"),
    ):
        found = run(*words)
        assert isinstance(found.exception, RecipeError), words
        assert said in str(found.exception), words
    assert "ann is deleted; 1 job now of root" in run("delete", "ann", "--hand-over-to", "root").stdout
    assert isinstance(run("delete", "ann").exception, RecipeError)
    assert "may make a user of this name again" in run("enable", "ann").stdout
    assert isinstance(run("enable", "ann").exception, RecipeError)
    first = next(root.audit(user="ann", action="delete"))
    assert (first.action, first.details) == ("user delete", {"hand_over_to": "root", "jobs": 1})
    assert run("create", "--name", "ann").exit_code == 0


def test_a_deletion_is_one_transaction(people: People) -> None:
    """Where the deletion fails at its end, no job has moved."""
    ann = people.client("ann", "admin")
    job = ann.submit(RECIPE)
    people.service.users.disable("root")
    people.client("bob")
    with pytest.raises(RecipeError, match="ann is the last admin"):
        delete_user(people.database, "ann", hand_over_to="bob")
    assert job.refresh().owner == "ann"
    assert [event["kind"] for event in people.service.jobs.events(job.id, 0)] == ["state"]
