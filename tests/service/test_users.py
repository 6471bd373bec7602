"""Users, roles, scopes and tokens: who may do what, on every route."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness
from helpers.team import HTML, Team

from llmprune.service.api.access.route_scopes import ROUTES, scope_of
from llmprune.service.users.tokens import SCOPES_OF, digest_of
from llmprune.service.users.users import ROLES


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
