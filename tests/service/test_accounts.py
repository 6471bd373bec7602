"""Tokens and sessions of users, the pages and commands for them, and what an upgrade keeps."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.service import ServiceHarness
from helpers.team import HTML, Team
from typer.testing import CliRunner

from llmprune.cli.main import app as command_line
from llmprune.common.errors import RecipeError
from llmprune.service.database.schema import steps
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.users.sessions import Sessions
from llmprune.service.users.tokens import MAX_TOKENS, SCOPES, SCOPES_OF, Caller, Tokens, digest_of
from llmprune.service.users.users import Users


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    """One team for the tests that leave its users as they are."""
    return Team(tmp_path_factory.mktemp("team"))


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
    assert ('value="2 GB"' in page, 'name="gpus" value="none"' in page, 'name="running" value=""' in page) == (
        True,
    ) * 3
    wrong = team.ask("admin", "POST", "/users/new/quotas", data={"running": "many"}, headers=HTML)
    assert (wrong.status_code, "is no limit" in wrong.text) == (422, True)
    shown = team.ask("admin", "POST", "/users/new/tokens", data={"name": "t", "read": "on"}, headers=HTML)
    assert "llmprune_" in shown.text
    assert team.ask("admin", "POST", "/users/new/tokens/t/revoke").status_code == 303
    assert team.ask("admin", "GET", "/users/nobody", headers=HTML).status_code == 404


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
