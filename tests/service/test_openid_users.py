"""Users that a sign-in at an OpenID provider makes or finds, and the options of the provider."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from helpers.openid_provider import OpenIDProvider
from helpers.service import ServiceHarness
from helpers.sign_in import Door, refused
from typer.testing import CliRunner

from llmprune.cli.main import app as command_line
from llmprune.common.errors import RecipeError
from llmprune.service.oidc.provider import Provider
from llmprune.service.oidc.settings import OidcSettings
from llmprune.service.server import require_token
from llmprune.service.settings import Settings
from llmprune.service.users.deleted_users import delete_user, readmit


def test_a_deleted_user_does_not_come_back_alone(door: Door) -> None:
    """Neither the sign-in nor the name of a deleted user makes it again; an admin does, by address or by name."""
    door.users.create("boss", "admin")
    for subject, name in (("gone-1", "gone"), ("gone-2", "gone")):
        door.idp.person(subject, preferred_username=name, email="gone@x.org", email_verified=True)
    assert door.sign_in("gone-1").status_code == 200
    database = door.harness.service.database
    delete_user(database, "gone")
    assert door.http.get("/v1/account").status_code == 401  # the session has ended
    for subject in ("gone-1", "gone-2"):
        refused(
            door.sign_in(subject), 403, "the user gone was deleted here; ask an admin to make a user with your e-mail"
        )
    door.users.create("returned", "viewer", email="gone@x.org")
    assert door.sign_in("gone-1").status_code == 200
    assert door.http.get("/v1/account").json()["name"] == "returned"
    delete_user(database, "returned")
    door.idp.person("gone-1", preferred_username="other", email="gone@x.org", email_verified=True)
    refused(door.sign_in("gone-1"), 403, "the user gone was deleted here")  # by its subject, whatever its name now is
    assert (readmit(database, "gone"), readmit(database, "returned"), readmit(database, "x")) == (True, True, False)
    assert door.sign_in("gone-1").status_code == 200
    assert {user.name for user in door.users.all()} == {"boss", "other"}


def test_who_becomes_whom(tmp_path: Path, idp: OpenIDProvider) -> None:
    """A known e-mail address links to its user; names of others are not taken over; a disabled user stays out."""
    door = Door(tmp_path, idp)
    door.users.create("boss", "admin", email="boss@x.org")
    door.users.create("bob", "user")
    idp.person("b1", preferred_username="head", email="BOSS@x.org", email_verified=True)
    assert door.sign_in("b1").status_code == 200
    assert door.http.get("/v1/account").json() | {"usage": 0, "quotas": 0, "scopes": 0} == {
        **{"name": "boss", "role": "admin"},
        **{"usage": 0, "quotas": 0, "scopes": 0},
    }
    idp.person("b2", preferred_username="head", email="boss@x.org", email_verified=False)
    assert door.sign_in("b2").status_code == 200
    assert door.http.get("/v1/account").json()["name"] == "head"  # the address was not verified
    idp.person("b3", preferred_username="bob")
    refused(door.sign_in("b3"), 403, "the name 'bob' belongs to a user who does not sign in here")
    idp.person("b4", preferred_username="no name <b>")
    refused(door.sign_in("b4"), 403, "which is no name for a user")
    idp.person("b5", email="x@y.org")
    refused(door.sign_in("b5"), 403, "tells no claim 'preferred_username'")
    idp.person("b6", preferred_username="local")
    refused(door.sign_in("b6"), 403, "not 'local'")
    door.users.disable("head")
    refused(door.sign_in("b2"), 403, "the user head is disabled; ask an admin")
    audited = door.harness.service.database.read("SELECT count(*) n FROM users")
    assert audited[0]["n"] == 3


def test_groups_and_domains(tmp_path: Path, idp: OpenIDProvider) -> None:
    """The highest role of a person's groups holds at each sign-in; others, and other domains, do not get in."""
    roles = (("all", "viewer"), ("ops", "admin"), ("ml", "user"))
    door = Door(tmp_path, idp, roles=roles, default_role=None, domains=("x.org",))
    person = {"preferred_username": "ann", "email": "ann@x.org", "email_verified": True}
    idp.person("g1", **person, groups=["all", "ops"])
    assert door.sign_in("g1").status_code == 200
    assert door.users.get("ann").role == "admin"
    idp.person("g1", **person, groups=["all"])
    door.sign_in("g1")
    assert door.users.get("ann").role == "viewer"
    idp.person("g1", **person, groups=[])
    refused(door.sign_in("g1"), 403, "in no group that may use this service")
    idp.person("g1", **person | {"email": "ann@y.org"}, groups=["all"])
    refused(door.sign_in("g1"), 403, "ann@y.org, is not of x.org")
    idp.person("g1", **person | {"email_verified": False}, groups=["all"])
    refused(door.sign_in("g1"), 403, "has not verified")


def test_the_options(tmp_path: Path, idp: OpenIDProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong options are refused before the service starts; a service with a provider needs no token first."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    chosen: list[Settings] = []
    monkeypatch.setattr("llmprune.service.server.serve", chosen.append)
    given = ["serve", "--gpus", "none", "--data-dir", str(tmp_path / "data")]
    both = ["--oidc-issuer", idp.issuer, "--oidc-client-id", "c"]

    def serve(*options: str) -> Any:
        return CliRunner().invoke(command_line, [*given, *options])

    right = serve(*both, "--oidc-client-secret-file", str(secret), "--oidc-role", "a=b=admin", "--oidc-domain", "x.org")
    assert right.exit_code == 0, right.output
    settings = chosen[0].oidc
    assert settings is not None
    assert (settings.roles, settings.domains, settings.secret()) == ((("a=b", "admin"),), ("x.org",), "s")
    assert "s3cret" not in chosen[0].model_dump_json()
    harness = ServiceHarness(tmp_path, oidc=settings, host="0.0.0.0")
    require_token(harness.settings, harness.service.tokens)
    for options, message in (
        (["--oidc-client-id", "c"], "--oidc-issuer: is missing"),
        (both[:2], "--oidc-client-id: is missing"),
        (["--oidc-issuer", "http://id.example.org", *both[2:]], "needs https"),
        (["--oidc-issuer", "id.example.org", *both[2:]], "give its URL"),
        ([*both, "--oidc-client-secret-file", str(tmp_path / "none")], "cannot be read"),
        ([*both, "--oidc-role", "ops"], "give GROUP=ROLE"),
        ([*both, "--oidc-scopes", "email"], "has no 'openid'"),
    ):
        found = serve(*options)
        assert isinstance(found.exception, RecipeError), (options, found.output)
        assert message in str(found.exception)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing extra gives a sentence with the exact install line."""
    original = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("authlib"):
            raise ImportError(name)
        return original(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"pip install 'llmprune\[oidc\]'"):
        Provider(OidcSettings(issuer="https://id.example.org", client_id="c"))
