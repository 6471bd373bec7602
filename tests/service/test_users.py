"""Users, roles, scopes and tokens: who may do what, on every route, and what an upgrade keeps."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness
from typer.testing import CliRunner

from llmprune.cli.main import app as command_line
from llmprune.common.errors import RecipeError
from llmprune.service.api.route_scopes import ROUTES, scope_of
from llmprune.service.jobs.schema import steps
from llmprune.service.jobs.sessions import Sessions
from llmprune.service.jobs.sqlite import SqliteDatabase
from llmprune.service.jobs.tokens import MAX_TOKENS, SCOPES, SCOPES_OF, Caller, Tokens, digest_of
from llmprune.service.jobs.users import ROLES, Users

HTML = {"Accept": "text/html"}


class Team:
    """A service with a user of each role, named as the role."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.harness = ServiceHarness(folder, burst=10_000, **changes)
        self.service = self.harness.service
        self.tokens = {role: self.service.tokens.create(role, role) for role in ROLES}

    def ask(self, who: str, method: str, path: str, **request: Any) -> Any:
        """The answer to a request with a token: of a user by name, or the token itself."""
        headers = {"Authorization": f"Bearer {self.tokens.get(who, who)}"} | request.pop("headers", {})
        return self.harness.http.request(method, path, headers=headers, follow_redirects=False, **request)

    def token(self, owner: str, **settings: Any) -> str:
        """A further token of a user."""
        token: str = self.service.tokens.create(owner, name=f"t{time.monotonic_ns()}", **settings)
        return token


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    """One team for the tests that leave its users as they are."""
    return Team(tmp_path_factory.mktemp("team"))


def routes_of(routed: Any) -> Iterator[str]:
    """Method and path of every route of an app."""
    for route in routed.routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router)
        else:
            yield from (f"{method} {route.path}" for method in route.methods - {"HEAD"})


def test_every_route_has_a_scope(team: Team) -> None:
    """The table names every route of the app once, and no other; what it does not know only admins may change."""
    named = [route for routes in ROUTES.values() for route in routes]
    assert sorted(named) == sorted(set(routes_of(team.harness.app)))
    assert (scope_of("GET", "/new"), scope_of("POST", "/new"), scope_of("HEAD", "/audit")) == ("read", "admin", "admin")
    for scope, routes in ROUTES.items():  # a path with values is found as its template is
        for method, path in (route.split(" ") for route in routes):
            assert scope_of(method, path.replace("{", "").replace("}", "").replace(":path", "")) == scope, path


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reaches_its_routes_and_no_others(team: Team, role: Any) -> None:
    """Each kind of request that a role does not allow is refused with a sentence that names role and remedy."""
    for scope, routes in ROUTES.items():
        is_allowed = scope is None or scope in SCOPES_OF[role]
        for method, path in (route.split(" ") for route in (routes[:1] if is_allowed else routes)):
            answer = team.ask(role, method, path.replace("{job}", "0" * 12))
            assert (answer.status_code == 403) != is_allowed, (role, scope, answer.text)
            if not is_allowed:
                assert f"the role {role} may not" in answer.json()["detail"]
                assert "ask an admin" in answer.json()["detail"]
    for page in ("/", "/account"):
        assert team.ask(role, "GET", page, headers=HTML).status_code == 200


def test_a_token_never_does_more_than_its_user_or_its_scopes(team: Team) -> None:
    """A reading token submits nothing and makes no token; a token with the scope admin makes no user an admin."""
    reads = team.token("admin", scopes=["read", "account"])
    private = team.ask("user", "POST", "/v1/jobs", content=RECIPE, headers=YAML).json()["id"]
    assert team.ask("admin", "GET", f"/v1/jobs/{private}").status_code == 200
    assert team.ask(reads, "GET", f"/v1/jobs/{private}").status_code == 404  # it does not read as an admin
    refused = team.ask(reads, "POST", "/v1/jobs", content=RECIPE, headers=YAML)
    assert (refused.status_code, "the role viewer may not submit jobs" in refused.text) == (403, True)
    more = {"name": "more", "scopes": ["read", "admin"]}
    assert team.ask(reads, "POST", "/v1/account/tokens", json=more).status_code == 403
    made = team.ask(reads, "POST", "/v1/account/tokens", json={"name": "whole"}).json()["token"]
    assert team.ask(made, "POST", "/v1/jobs", content=RECIPE, headers=YAML).status_code == 403
    assert team.ask(team.token("user"), "GET", "/v1/users").status_code == 403
    submits = team.token("user", scopes=["read", "submit"])
    assert team.ask(submits, "POST", "/v1/jobs", content=RECIPE, headers=YAML).status_code == 201
    refused = team.ask(submits, "POST", f"/v1/jobs/{private}/cancel")
    assert (refused.status_code, "lacks the scope 'manage'" in refused.text) == (403, True)


def test_the_session_of_a_token_has_its_scopes(team: Team) -> None:
    """A browser that signed in with a limited token may do no more than the token."""
    limited = team.token("user", scopes=["read"])
    answer = team.harness.http.post("/login", data={"token": limited}, follow_redirects=False)
    cookie = {"Cookie": answer.headers["Set-Cookie"].split(";")[0]} | HTML
    team.harness.http.cookies.clear()
    assert team.harness.http.get("/", headers=cookie).status_code == 200
    page = team.harness.http.get("/submit", headers=cookie)
    assert (page.status_code, "may not submit jobs" in page.text) == (403, True)


def test_an_expired_token_and_a_disabled_user(team: Team) -> None:
    """Both are refused with their reason, in the API and at the sign-in; enabling makes the token work again."""
    service = team.service
    service.users.create("leaver", "user")
    token, old = team.token("leaver", days=5), team.token("leaver", days=5)
    session = service.sessions.open_with(token)
    with service.database.write() as connection:
        connection.execute("UPDATE tokens SET expires = 1 WHERE digest = ?", (digest_of(old),))
    expired = team.ask(old, "GET", "/v1/jobs")
    assert (expired.status_code, "this token expired on 1970-01-01" in expired.text) == (401, True)
    assert team.harness.http.post("/login", data={"token": old}).status_code == 401
    assert team.ask(token, "GET", "/v1/jobs").status_code == 200
    assert team.ask("admin", "PATCH", "/v1/users/leaver", json={"disabled": True}).json()["disabled"] is True
    refused = team.ask(token, "GET", "/v1/jobs")
    assert (refused.status_code, "the user leaver is disabled; ask an admin" in refused.text) == (403, True)
    sign_in = team.harness.http.post("/login", data={"token": token})
    assert (sign_in.status_code, "is disabled" in sign_in.text) == (403, True)
    service.users.enable("leaver")
    assert team.ask(token, "GET", "/v1/jobs").status_code == 200
    assert service.sessions.caller(session) is None  # sessions ended when the user was disabled


def test_a_busy_table_keeps_no_reader_waiting(team: Team) -> None:
    """A request is answered while another process writes, though its time could not be recorded."""
    token = team.token("user")
    with team.service.database.write():
        assert team.ask(token, "GET", "/v1/jobs").status_code == 200


def test_the_last_admin_stays(team: Team) -> None:
    """The last admin who may sign in cannot be disabled or given another role."""
    for change in ({"disabled": True}, {"role": "user"}):
        answer = team.ask("admin", "PATCH", "/v1/users/admin", json=change)
        assert (answer.status_code, "is the last admin" in answer.text) == (422, True)
    assert team.ask("admin", "PATCH", "/v1/users/nobody", json={"disabled": True}).status_code == 404


def test_own_tokens_and_sessions(team: Team) -> None:
    """A token is shown once, listed with its last use, and revoked by its user alone; all sessions end together."""
    made = team.ask("user", "POST", "/v1/account/tokens", json={"name": "laptop", "days": 30}).json()["token"]
    assert team.ask(made, "GET", "/v1/jobs").status_code == 200
    listed = {one["name"]: one for one in team.ask("user", "GET", "/v1/account/tokens").json()}
    assert made not in str(listed)
    assert listed["laptop"]["used"] is not None
    assert 29 < (listed["laptop"]["expires"] - time.time()) / 86_400 < 31
    twice = team.ask("user", "POST", "/v1/account/tokens", json={"name": "laptop"})
    assert (twice.status_code, "there is a token of this name" in twice.text) == (422, True)
    assert team.ask("viewer", "DELETE", f"/v1/account/tokens/{listed['laptop']['id']}").status_code == 404
    opened = [team.service.sessions.open_with(made) for _ in range(2)]
    assert len(team.ask("user", "GET", "/v1/account/sessions").json()) >= 2
    assert team.ask("user", "DELETE", "/v1/account/sessions").status_code == 204
    assert [team.service.sessions.caller(one) for one in opened] == [None, None]
    assert team.ask("user", "DELETE", "/v1/account/tokens/laptop").status_code == 204
    assert team.ask(made, "GET", "/v1/jobs").status_code == 401
    for wrong in ({"name": "x", "scopes": []}, {"name": "<b>"}, {"name": "x", "days": 0}, {"name": "x", "days": 1e9}):
        assert team.ask("user", "POST", "/v1/account/tokens", json=wrong).status_code == 422, wrong


def test_the_pages_of_account_and_users(team: Team) -> None:
    """The forms make a token, shown once, and change role, access and quotas; mistakes are shown on the page."""
    page = team.ask("user", "POST", "/account/tokens", data={"name": "page", "read": "on"}, headers=HTML)
    assert (page.status_code, "Copy it now" in page.text, "llmprune_" in page.text) == (200, True, True)
    assert "llmprune_" not in team.ask("user", "GET", "/account", headers=HTML).text
    assert team.ask("user", "POST", "/account/tokens", data={"name": "page"}, headers=HTML).status_code == 422
    assert team.ask("user", "POST", "/account/tokens/page/revoke").headers["Location"] == "/account"
    made = team.ask("admin", "POST", "/users", data={"name": "new", "role": "viewer", "email": "N@x.org"})
    assert (made.headers["Location"], team.service.users.get("new").email) == ("/users/new", "n@x.org")
    again = team.ask("admin", "POST", "/users", data={"name": "new"}, headers=HTML)
    assert (again.status_code, "there is a user of this name" in again.text) == (422, True)
    team.ask("admin", "POST", "/users/new", data={"role": "user", "email": ""})
    team.ask("admin", "POST", "/users/new", data={"access": "disable"})
    found = team.service.users.get("new")
    assert (found.role, found.email, found.disabled) == ("user", None, True)
    assert team.ask("admin", "POST", "/users/new/quotas", data={"disk": "2GB", "gpus": "none"}).status_code == 303
    page = team.ask("admin", "GET", "/users/new", headers=HTML).text
    assert 'value="2 GB"' in page
    wrong = team.ask("admin", "POST", "/users/new/quotas", data={"running": "many"}, headers=HTML)
    assert (wrong.status_code, "is no limit" in wrong.text) == (422, True)
    shown = team.ask("admin", "POST", "/users/new/tokens", data={"name": "t", "read": "on"}, headers=HTML)
    assert "llmprune_" in shown.text
    assert team.ask("admin", "POST", "/users/new/tokens/t/revoke").status_code == 303
    assert team.ask("admin", "GET", "/users/nobody", headers=HTML).status_code == 404


def test_sharing_and_transfer(tmp_path: Path) -> None:
    """An owner shares a job and makes it private again; an admin gives all jobs of a leaver to somebody else."""
    team = Team(tmp_path)
    team.service.users.create("heir", "user")
    heir = team.token("heir")
    job = team.ask("user", "POST", "/v1/jobs", content=RECIPE, headers=YAML).json()["id"]
    assert team.ask("viewer", "GET", f"/v1/jobs/{job}").status_code == 404
    assert team.ask(heir, "POST", f"/v1/jobs/{job}/share").status_code == 404
    assert team.ask("user", "POST", f"/v1/jobs/{job}/share").json()["shared"] is True
    assert team.ask("viewer", "GET", f"/v1/jobs/{job}").status_code == 200
    assert team.ask(heir, "POST", f"/v1/jobs/{job}/unshare").status_code == 403
    assert team.ask("user", "POST", f"/jobs/{job}/unshare").headers["Location"] == f"/jobs/{job}"
    assert team.ask("viewer", "GET", f"/v1/jobs/{job}").status_code == 404
    kinds = [row["kind"] for row in team.service.jobs.events(job, 0)]
    assert kinds == ["state", "shared", "shared"]
    for to in ("user", "nobody"):
        assert team.ask("admin", "POST", "/v1/users/user/transfer", json={"to": to}).status_code == 422
    assert team.ask("admin", "POST", "/v1/users/user/transfer", json={"to": "heir"}).json() == {"jobs": 1}
    assert team.ask(heir, "GET", f"/v1/jobs/{job}").json()["owner"] == "heir"
    assert team.ask("user", "GET", f"/v1/jobs/{job}").status_code == 404


def test_a_service_without_users_makes_none_over_http(tmp_path: Path) -> None:
    """The first user is made on the machine, because a user without a token would lock everybody out."""
    harness = ServiceHarness(tmp_path)
    assert "llmprune token create" in harness.http.get("/account", headers=HTML).text
    for path, body in (("/v1/users", {"name": "ann"}), ("/v1/account/tokens", {"name": "t"})):
        answer = harness.http.post(path, json=body)
        assert (answer.status_code, "llmprune token create" in answer.text) == (409, True)
    token = harness.service.tokens.create("ann", "admin")
    harness.service.tokens.revoke("ann")
    assert harness.http.get("/v1/jobs").status_code == 401  # it stays closed
    assert harness.http.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"}).status_code == 401


def test_limits_of_names_and_numbers(tmp_path: Path) -> None:
    """Names, roles, scopes, ages and the number of tokens have limits, each with its sentence."""
    database = SqliteDatabase(tmp_path / "service.sqlite3")
    database.migrate()
    tokens, users = Tokens(database), Users(database)
    for name in ("local", "", "a b", "x" * 65, "ä"):
        with pytest.raises(RecipeError, match="a name is at most 64"):
            users.create(name, "user")
    with pytest.raises(RecipeError, match="no e-mail address"):
        users.create("ann", "user", email="ann")
    with pytest.raises(RecipeError, match="there is no user 'ann'"):
        tokens.create("ann")
    tokens.create("ann", "user")
    with pytest.raises(RecipeError, match="has the role user"):
        tokens.create("ann", "admin", name="more")
    for number in range(MAX_TOKENS - 1):
        tokens.create("ann", name=f"n{number}")
    with pytest.raises(RecipeError, match="50 are allowed"):
        tokens.create("ann", name="one more")
    users.create("boss", "admin")
    lower = tokens.caller(tokens.create("boss", "user"))
    assert lower == Caller("boss", "user", SCOPES_OF["user"])


def test_an_upgrade_keeps_users_tokens_sessions_and_jobs(tmp_path: Path) -> None:
    """Tokens of the schema before become users with one token each; past owners of jobs keep their names."""
    path = tmp_path / "service.sqlite3"
    with sqlite3.connect(path) as connection:
        for step in steps("sqlite")[:9]:
            connection.executescript(step.sql)
        connection.execute("PRAGMA user_version = 9")
        connection.execute("INSERT INTO tokens VALUES ('ann', 'admin', ?, 5.0)", (digest_of("secret of ann"),))
        connection.execute("INSERT INTO tokens VALUES ('bob', 'user', ?, 6.0)", (digest_of("secret of bob"),))
        expires = time.time() + 3600
        connection.execute("INSERT INTO sessions VALUES (?, 'bob', ?)", (digest_of("session of bob"), expires))
        columns = "id, owner, name, model, recipe, overrides, launcher, gpus, priority, state, created"
        for number, owner in enumerate(("ann", "bob", "left", "local")):
            values = (f"{number:012x}", owner, "n", "m", "", "[]", "local", 0, 0, "queued", 7.0)
            connection.execute(f"INSERT INTO jobs ({columns}) VALUES ({', '.join('?' * 11)})", values)
    database = SqliteDatabase(path)
    database.migrate()
    tokens, users = Tokens(database), Users(database)
    assert [(user.name, user.role, user.created) for user in users.all()] == [
        ("ann", "admin", 5.0),
        ("bob", "user", 6.0),
        ("left", "user", 7.0),
    ]
    assert tokens.caller("secret of ann") == Caller("ann", "admin", frozenset(SCOPES))
    assert tokens.caller("secret of bob") == Caller("bob", "user", frozenset(SCOPES))
    assert Sessions(database).caller("session of bob") == Caller("bob", "user", frozenset(SCOPES))
    assert [row["owner"] for row in database.read("SELECT owner FROM jobs ORDER BY seq")] == [
        *("ann", "bob", "left", "local"),
    ]
    assert database.read("PRAGMA foreign_key_check") == []
    tokens.create("left", "user")  # an admin may let a past owner in again
    tokens.revoke("bob")
    assert Sessions(database).caller("session of bob") is None


def test_the_commands_of_users_and_tokens(tmp_path: Path) -> None:
    """What the commands make works, is listed and is in the audit log; wrong words are refused with the right ones."""

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(command_line, [*arguments, "--data-dir", str(tmp_path / "data")])

    token = run("token", "create", "--name", "ann", "--role", "admin").stdout.strip()
    limited = run("token", "create", "--name", "ann", "--label", "ci", "--scopes", "read", "--expires", "30")
    assert run("user", "create", "--name", "bob", "--role", "viewer", "--email", "b@x.org").exit_code == 0
    assert run("user", "set-quota", "--name", "bob", "--running", "2", "--disk", "1GB").exit_code == 0
    for arguments in (["set-role", "--role", "user"], ["set-email", "--email", ""], ["disable"], ["enable"]):
        assert run("user", *arguments, "--name", "bob").exit_code == 0, arguments
    assert "bob  user  -  enabled" in run("user", "list").stdout
    listed = run("token", "list").stdout.splitlines()
    assert [line.split("  ")[:4] for line in listed] == [
        ["ann", "admin", "first", ",".join(SCOPES)],
        ["ann", "admin", "ci", "read"],
    ]
    harness = ServiceHarness(tmp_path)
    assert harness.service.tokens.caller(token) == Caller("ann", "admin")
    assert harness.service.tokens.caller(limited.stdout.strip()).role == "viewer"
    assert "0 jobs of bob belong to ann now" in run("user", "transfer", "--name", "bob", "--to", "ann").stdout
    assert run("token", "revoke", "--name", "ann", "--label", "ci").exit_code == 0
    for words in (
        ("token", "create", "--name", "ann", "--label", "x", "--scopes", "all"),
        ("token", "revoke", "--name", "nobody"),
        ("user", "set-role", "--name", "bob"),
        ("user", "set-quota", "--name", "bob", "--gpus", "few"),
        ("user", "disable"),
    ):
        assert isinstance(run(*words).exception, RecipeError), words
    page = harness.http.get("/v1/audit", headers={"Authorization": f"Bearer {token}"}).json()
    actions = [entry["action"] for entry in page["entries"]]
    assert actions[:3] == ["token revoke", "user transfer", "user enable"]
    assert page["entries"][1]["details"] == {"to": "ann", "jobs": 0}
