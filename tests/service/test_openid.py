"""Sign-in at a real OpenID provider over HTTP: the flow, the users that it makes, and everything that goes wrong."""

from __future__ import annotations

import builtins
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from helpers.openid_provider import OpenIDProvider, openid_provider, sign_otherwise
from helpers.service import BASE, ServiceHarness
from typer.testing import CliRunner

from llmprune.cli.main import app as command_line
from llmprune.common.errors import RecipeError
from llmprune.service.jobs.deleted_users import delete_user, readmit
from llmprune.service.oidc import provider as oidc_provider
from llmprune.service.oidc.provider import Flow, Provider
from llmprune.service.oidc.settings import OidcSettings
from llmprune.service.server import require_token
from llmprune.service.settings import Settings

HTML = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def idp() -> Iterator[OpenIDProvider]:
    """One provider for all tests."""
    with openid_provider() as running:
        yield running


class Door:
    """A service with a provider, and a browser in front of it."""

    def __init__(self, folder: Path, idp: OpenIDProvider, **changes: Any) -> None:
        (folder / "secret").write_text("s3cret\n")
        settings = {"issuer": idp.issuer, "client_id": "llmprune", "secret_file": folder / "secret"} | changes
        self.idp = idp
        self.harness = ServiceHarness(folder, oidc=OidcSettings(**settings), burst=10_000)
        self.http, self.users = self.harness.http, self.harness.service.users

    def begin(self, next: str = "/") -> str:
        """Click on the sign-in; return the provider's address."""
        answer = self.http.get("/login/oidc", params={"next": next}, follow_redirects=False)
        assert answer.status_code == 303, answer.text
        return str(answer.headers["Location"])

    def back(self, address: str) -> Any:
        """Come back from the provider."""
        assert address.startswith(f"{BASE}/login/oidc/callback?")
        return self.http.get(address, headers=HTML)

    def sign_in(self, subject: str) -> Any:
        """Sign in as a person of the provider; return the page that the browser gets."""
        return self.back(self.idp.answer(self.begin(), subject))


@pytest.fixture
def door(tmp_path: Path, idp: OpenIDProvider) -> Door:
    """A service with a user who has signed in before."""
    idp.person("ann-1", preferred_username="ann", email="ann@x.org", email_verified=True)
    return Door(tmp_path, idp)


def refused(answer: Any, status: int, sentence: str) -> None:
    """Check that a sign-in was refused with a sentence, and opened no session."""
    assert (answer.status_code, sentence in answer.text.replace("&#39;", "'")) == (status, True), answer.text
    assert "llmprune_session" not in str(answer.headers.get("Set-Cookie"))


def last_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The last line that the operator reads about the provider."""
    return [one.getMessage() for one in caplog.records if one.name == oidc_provider.__name__][-1]


def test_a_person_signs_in_and_out(door: Door) -> None:
    """The first sign-in makes the user; the session works, survives as today's do, and ends with the sign-out."""
    page = door.http.get("/compare", headers=HTML)  # leads to the sign-in
    assert f"Sign in at {door.idp.issuer.removeprefix('http://')}" in page.text
    address = door.begin("/compare")
    assert all(part in address for part in ("code_challenge_method=S256", "nonce=", "state=", "response_type=code"))
    cookie = door.http.cookies.jar
    assert [(one.name, one.path) for one in cookie] == [("llmprune_sign_in", "/login")]
    answer = door.back(door.idp.answer(address, "ann-1"))
    assert (answer.status_code, 'content="0;url=/compare"' in answer.text) == (200, True)
    session = next(one for one in answer.headers.get_list("Set-Cookie") if one.startswith("llmprune_session"))
    assert all(word in session for word in ("HttpOnly", "SameSite=strict", "Path=/"))
    assert "form-action 'self'" in answer.headers["Content-Security-Policy"]
    assert door.http.get("/v1/account").json()["name"] == "ann"
    (user,) = door.users.all()
    assert (user.name, user.role, user.email, user.signs_in) == ("ann", "user", "ann@x.org", True)
    made = door.http.post("/v1/account/tokens", json={"name": "cli"}).json()["token"]  # for the command line
    out = door.http.post("/logout", headers=HTML)
    assert (out.status_code, "end_session" in out.text) == (200, True)
    assert door.http.get("/v1/account").status_code == 401
    assert door.http.get("/v1/account", headers={"Authorization": f"Bearer {made}"}).status_code == 200
    door.sign_in("ann-1")
    assert len(door.users.all()) == 1


def test_pkce_binds_the_code_to_this_sign_in(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sign-in has a new challenge, S256 of the verifier at the token endpoint; another verifier opens nothing."""
    for _ in range(2):
        address = door.begin()
        code = parse_qs(urlsplit(back := door.idp.answer(address, "ann-1")).query)["code"][0]
        door.back(back)
        verifier = door.idp.verifiers[-1]
        challenge = urlsafe_b64encode(sha256(verifier.encode()).digest()).decode().rstrip("=")
        assert parse_qs(urlsplit(address).query)["code_challenge"] == [challenge] == [door.idp.challenges[code]]
        assert len(verifier) >= 43
    assert len({*door.idp.verifiers[-2:]}) == 2
    monkeypatch.setattr(oidc_provider, "Flow", lambda state, nonce, _: Flow(state, nonce, "v" * 48))
    refused(door.sign_in("ann-1"), 401, "not valid")


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


def test_the_page_afterwards_is_of_this_service(door: Door) -> None:
    """An address of another site, however it is written, becomes the first page."""
    for next in ("//evil.example", "/\\evil.example", "/\t/evil.example", "https://evil.example", "x"):
        answer = door.back(door.idp.answer(door.begin(next), "ann-1"))
        assert (answer.status_code, 'content="0;url=/"' in answer.text, "evil" in answer.text) == (200, True, False)


def test_cookies_behind_a_proxy(tmp_path: Path, idp: OpenIDProvider) -> None:
    """Behind a trusted proxy with TLS the address back is https and both cookies are Secure."""
    (tmp_path / "secret").write_text("s")
    settings = OidcSettings(issuer=idp.issuer, client_id="llmprune", secret_file=tmp_path / "secret")
    harness = ServiceHarness(tmp_path, oidc=settings, trusted_proxies=("testclient",))
    tls = {"X-Forwarded-Proto": "https"}
    answer = harness.http.get("/login/oidc", headers=tls, follow_redirects=False)
    assert ("https%3A%2F%2F" in answer.headers["Location"], "Secure" in answer.headers["Set-Cookie"]) == (True, True)
    cookie = {"Cookie": answer.headers["Set-Cookie"].split(";")[0]}
    back = idp.answer(answer.headers["Location"], "x-of-proxy", sub="x-of-proxy")
    idp.person("x-of-proxy", preferred_username="proxied")
    done = harness.http.get(back.replace("https://", "http://"), headers=tls | cookie)
    assert all("Secure" in one for one in done.headers.get_list("Set-Cookie") if "session=" in one), done.text


def test_answers_that_were_not_asked_for(door: Door) -> None:
    """Without a sign-in of this browser, with another state or with an error no session is opened."""
    refused(door.http.get("/login/oidc/callback?code=x&state=y", headers=HTML), 401, "not begun in this browser")
    address = door.idp.answer(door.begin(), "ann-1")
    refused(door.http.get(address.replace("state=", "state=x"), headers=HTML), 401, "not begun in this browser")
    refused(door.http.get(address, headers=HTML), 401, "not begun in this browser")  # the cookie was used up
    address = door.begin()
    state = parse_qs(urlsplit(address).query)["state"][0]
    denied = f"{door.idp.answer(address, '', action='deny')}&state={state}"  # the provider leaves it out
    refused(door.back(denied), 401, "the provider refused the sign-in")
    address = door.idp.answer(door.begin(), "ann-1")
    refused(door.http.get(f"{address}&iss=https://other.example", headers=HTML), 401, "another provider")
    address = door.begin().replace("nonce=", "nonce=x")
    refused(door.back(door.idp.answer(address, "ann-1")), 401, "not valid")
    address = door.idp.answer(door.begin(), "ann-1")
    refused(door.back(address.replace("code=", "code=x")), 401, "not valid")


def test_tokens_that_are_not_for_this_service(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An ID token that has expired, is for another client, of another issuer or signed by another key is refused."""
    for wrong, logged in (
        ({"exp": 1_700_000_000}, "expired_token"),
        ({"aud": "other"}, "invalid_claim: Invalid claim: 'aud'"),
        ({"aud": ["llmprune", "other"]}, "missing_claim: Missing claim: 'azp'"),
        ({"iss": "https://evil.example"}, "invalid_claim: Invalid claim: 'iss'"),
    ):
        door.idp.person("forged", preferred_username="forged", **wrong)
        refused(door.sign_in("forged"), 401, "not valid")
        assert logged in last_warning(caplog)
    with monkeypatch.context() as patch:
        shared = {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}
        sign_otherwise(patch, alg="HS256", key=shared)
        refused(door.sign_in("ann-1"), 401, "not valid")
        assert "unsupported_algorithm" in last_warning(caplog)
    assert door.users.all() == []
    assert door.sign_in("ann-1").status_code == 200


def test_a_provider_that_is_away(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sign-in page says so, before and after the person was at the provider; tokens still open the door."""
    door.idp.down = True
    answer = door.http.get("/login/oidc", headers=HTML)
    refused(answer, 503, "the OpenID provider does not answer; try again, or sign in with a token")
    assert door.http.get("/login?out=true", headers=HTML).status_code == 200
    door.idp.down = False
    address = door.idp.answer(door.begin(), "ann-1")
    door.idp.down = True
    answer = door.back(address)
    door.idp.down = False
    assert (answer.status_code in (401, 503), "llmprune_session" in str(answer.headers)) == (True, False)
    token = door.harness.service.tokens.create("boss", "admin")
    assert door.http.post("/login", data={"token": token}, follow_redirects=False).status_code == 303
    door.idp.claims_to_issuer = "http://127.0.0.1:1"
    assert door.harness.settings.oidc is not None
    misnamed = Provider(door.harness.settings.oidc)
    with pytest.raises(oidc_provider.SignInRefused, match=r"calls itself 'http://127\.0\.0\.1:1'"):
        misnamed.begin("http://x/")
    door.idp.claims_to_issuer = None


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
