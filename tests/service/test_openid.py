"""Sign-in at a real OpenID provider over HTTP: the flow, and everything that goes wrong."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from helpers.openid_provider import OpenIDProvider, sign_otherwise
from helpers.service import ServiceHarness
from helpers.sign_in import HTML, Door, refused

from llmprune.service.oidc import provider as oidc_provider
from llmprune.service.oidc.provider import Flow, Provider
from llmprune.service.oidc.settings import OidcSettings


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
