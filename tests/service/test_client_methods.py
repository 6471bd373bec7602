"""Methods of the Python client for the model library, sweeps, uploads, accounts and users."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from helpers.finished import write_run
from helpers.people import People
from helpers.service import RECIPE

from llmprune import AsyncClient
from llmprune.common.errors import AccessDenied, NotFound, RecipeError, ServiceBusy, StateConflict
from llmprune.service.client.calls import values_of
from llmprune.service.client.sync import models as model_methods
from llmprune.service.logs import audit_command


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    """A service with an admin, and with ann, who has three models."""
    made = People(tmp_path_factory.mktemp("methods"))
    made.client("root", "admin")
    made.client("bob")
    ann = made.client("ann")
    jobs = [ann.submit(RECIPE, name=name) for name in ("alpha", "beta", "gamma")]
    while made.harness.supervisor.round() or not all(job.refresh().ended for job in jobs):
        pass
    return made


def test_models_are_listed_over_pages(people: People, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters and order are those of the API; further pages are asked for up to the limit; wrong words are refused."""
    monkeypatch.setattr(model_methods, "_PAGE", 2)
    ann = people.client("ann")
    assert [model.name for model in ann.models(sort="name", order="asc")] == ["alpha", "beta", "gamma"]
    assert len([*ann.models(limit=1)]) == 1
    (one,) = ann.models(search="beta", stage="candidate", owner="ann")
    assert ann.model(one.id) == one
    page = ann.model_page(limit=2)
    assert {model.id for model in page.models} & {one.id for one in ann.model_page(after=page.next).models} == set()
    assert [*people.client("bob").models()] == []
    with pytest.raises(RecipeError, match="sort: Input should be"):
        ann.model_page(sort="best")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'tags' is no argument here; .*did you mean 'tag'"):
        ann.model_page(tags="x")  # type: ignore[call-arg]
    with pytest.raises(NotFound):
        ann.model("0" * 12)
    with pytest.raises(RecipeError, match="there is no job 'beta'"):
        ann.model("beta")


def test_several_models_change_together_or_not_at_all(people: People) -> None:
    """A model of another user, one that is missing or one in use refuses the whole change."""
    ann, bob = people.client("ann"), people.client("bob")
    first, second, third = (model.id for model in ann.models(sort="name", order="asc"))
    assert ann.label(first, stage="retired", notes="old").stage == "retired"
    labelled = ann.label_models([first, second], add_tags=["lab"], stage="candidate")
    assert [(model.id, model.tags, model.stage) for model in labelled] == [
        *((first, ("lab",), "candidate"), (second, ("lab",), "candidate")),
    ]
    for job in (second, "0" * 12):
        with pytest.raises(NotFound):
            bob.label_models([job], add_tags=["mine"])
    ann.job(third).share()
    with pytest.raises(AccessDenied, match="only its owner and admins"):
        bob.delete_models([third])
    with pytest.raises(AccessDenied, match="only its owner and admins may change its labels"):
        bob.label_models([third], add_tags=["mine"])
    waiting = ann.submit(RECIPE)
    with pytest.raises(StateConflict, match=f"job {waiting.id} has no result"):
        ann.label_models([first, waiting.id], add_tags=["more"])
    with pytest.raises(StateConflict, match=f"job {waiting.id} is queued; cancel it first"):
        ann.delete_models([first, waiting.id])
    assert ann.model(first).tags == ("lab",)
    assert ann.delete_models([first, second, first]) == 2
    assert [model.id for model in ann.models()] == [third]
    assert not people.harness.settings.folder(first).exists()
    for wrong in ([], ["x"]):
        with pytest.raises(RecipeError):
            ann.delete_models(wrong)
    waiting.cancel()


def test_sweeps(people: People) -> None:
    """A sweep is started from values or texts, read, compared and cancelled; another user sees none of it."""
    ann, bob = people.client("ann"), people.client("bob")
    sweep = ann.submit_sweep(RECIPE, vary={"depth.remove": [1, 2], "width.mlp": ["0.5"]}, name="both", key="k")
    assert [one.point for one in sweep.jobs] == [("1", "0.5"), ("2", "0.5")]
    assert ann.submit_sweep(RECIPE, vary=["depth.remove=1,2", "width.mlp=0.5"], name="both", key="k").id == sweep.id
    assert [one.id for one in ann.sweeps()] == [sweep.id]
    assert [job.id for job in ann.compare(sweep).jobs] == [one.job.id for one in sweep.jobs]
    rows = list(csv.reader(io.StringIO(ann.compare_csv(ann.sweep(sweep.id)))))
    assert len(rows) == 3
    assert values_of({"a": ["x,y", "[1, 2]", [3, 4], True, 0.5]}) == ['a="x,y",[1, 2],[3, 4],true,0.5']
    with pytest.raises(NotFound, match="there is no sweep"):
        bob.sweep(sweep.id)
    assert (ann.cancel_sweep(sweep.id), ann.cancel_sweep(sweep.id)) == (2, 0)
    with pytest.raises(RecipeError, match="needs a key with two values"):
        ann.submit_sweep(RECIPE, vary={"depth.remove": [1]})
    with pytest.raises(RecipeError, match="'mine': an id is 12 of the digits"):
        ann.sweep("mine")


def test_an_asynchronous_upload(people: People, tmp_path: Path) -> None:
    """A run folder becomes a model, and its progress ends with all bytes."""
    run = write_run(tmp_path / "run")
    seen: list[tuple[int, int]] = []

    async def work(client: AsyncClient) -> None:
        job = await client.upload(run, name="sent", tags=["lab"], progress=lambda *at: seen.append(at))
        assert (await client.model(job.id)).tags == ("lab",)
        assert [model.name async for model in client.models(search="sent")] == ["sent"]
        with pytest.raises(NotFound, match="there is no upload"):
            await client.delete_upload("0" * 12)

    people.asynchronous("ann", work)
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert seen[-1] == (size, size)


def test_a_full_quota_is_an_error_at_once(people: People) -> None:
    """The client does not wait for it as it waits for a busy service."""
    pauses: list[float] = []
    ann, root = people.client("ann"), people.client("root")
    ann.connection.pause = pauses.append
    root.set_quotas("ann", per_day=0)
    with pytest.raises(ServiceBusy, match="quota 'Jobs submitted a day"):
        ann.submit(RECIPE)
    root.set_quotas("ann")
    assert pauses == []


def test_own_tokens_and_sessions(people: People) -> None:
    """A token is made, listed and revoked, after which a client with it is refused; sessions are listed and ended."""
    ann = people.client("ann")
    account = ann.account()
    assert (account.name, account.role, account.usage.kept > 0, account.quotas.running) == ("ann", "user", True, None)
    people.tokens["limited"] = ann.make_token("my laptop", scopes=["read"], days=2)
    limited = people.client("limited")
    assert [*limited.models(search="gamma")]
    with pytest.raises(AccessDenied, match="may not submit jobs"):
        limited.submit(RECIPE)
    assert [token.name for token in ann.tokens()] == ["first", "my laptop"]
    with pytest.raises(RecipeError, match="revoke it first"):
        ann.make_token("my laptop")
    opened = people.service.sessions.open_with(people.tokens["ann"], "Firefox")
    assert [one.browser for one in ann.sessions()] == ["Firefox"]
    ann.end_sessions()
    assert people.service.sessions.caller(opened) is None
    ann.revoke_token("my laptop")
    with pytest.raises(AccessDenied, match="LLMPRUNE_TOKEN"):
        limited.queue()
    with pytest.raises(NotFound, match="no token 'my laptop'"):
        ann.revoke_token("my laptop")


def test_users(people: People) -> None:
    """An admin makes, changes, lists and limits users, their tokens and sessions, and moves their jobs."""
    root = people.client("root")
    assert (root.create_user("new", email="N@x.org").role, root.user("new").email) == ("user", "n@x.org")
    people.tokens["new"] = root.make_user_token("new", "first", days=3)
    new = people.client("new")
    job = new.submit(RECIPE)
    assert [user.name for user in root.users()] == ["ann", "bob", "new", "root"]
    assert root.set_quotas("new", running=2, disk=None).own_quotas == {"running": 2, "disk": None}
    assert root.set_quotas("new", queued=4).own_quotas == {"queued": 4}
    assert root.change_user("new", role="viewer", email="").email is None
    assert [token.name for token in root.user_tokens("new")] == ["first"]
    assert root.transfer_jobs("new", to="bob") == 1
    assert people.client("bob").job(job.id).cancel().owner == "bob"
    session = people.service.sessions.open_with(people.tokens["new"])
    root.end_user_sessions("new")
    assert people.service.sessions.caller(session) is None
    root.revoke_user_token("new", "first")
    with pytest.raises(AccessDenied, match="LLMPRUNE_TOKEN"):
        new.account()
    with pytest.raises(NotFound, match="no token 'first'"):
        root.revoke_user_token("new", "first")
    with pytest.raises(RecipeError, match="there is a user of this name"):
        root.create_user("new")
    with pytest.raises(RecipeError, match="there is no user 'a b'"):
        root.user("a b")
    with pytest.raises(AccessDenied, match="the role user may not"):
        people.client("bob").users()


def test_the_audit_log_is_read_over_pages(people: People) -> None:
    """Entries come the newest first, up to the limit, by user and action."""
    for number in range(3):
        audit_command(people.harness.settings.data_dir, action="user create", user=f"u{number}")
    root = people.client("root")
    assert [entry.user for entry in root.audit(action="user create", limit=2)] == ["u2", "u1"]
    page = root.audit_page(limit=1, action="user create")
    assert [entry.user for entry in root.audit_page(before=page.next, action="user create").entries] == ["u1", "u0"]
    assert [entry.user for entry in root.audit(user="u0")] == ["u0"]
    with pytest.raises(RecipeError, match="since"):
        root.audit_page(since="yesterday")
