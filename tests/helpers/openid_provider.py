"""A real OpenID provider in this process: discovery, keys and signed tokens over HTTP, with faults on demand."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

import authlib.deprecate  # noqa: F401 - it shows its warnings again, so it comes before they are ignored
import flask
import pytest
import requests
import werkzeug.serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from oidc_provider_mock import User, _app, app


@dataclass
class OpenIDProvider:
    """A provider at ``issuer``, and what it was asked."""

    issuer: str
    client: requests.Session
    down: bool = False
    claims_to_issuer: str | None = None  # what discovery answers
    challenges: dict[str, str] = field(default_factory=dict)  # of PKCE, by the code that was given for each
    verifiers: list[str] = field(default_factory=list)  # of PKCE, as the token endpoint got them

    def person(self, subject: str, **claims: object) -> None:
        """Make or change a person. Claims such as ``aud`` replace those of the person's ID tokens."""
        self.client.put(f"{self.issuer}/users/{subject}", json=claims).raise_for_status()

    def answer(self, address: str, subject: str, **form: str) -> str:
        """Sign in as a person at the address that the service sent the browser to; return the address back."""
        asked = {} if form else {"sub": subject}
        response = self.client.post(address, data=asked | form, allow_redirects=False)
        assert response.status_code == 302, response.text
        return response.headers["Location"]

    def proves(self, code: str, verifier: str) -> bool:
        """Return whether a verifier belongs to the S256 challenge with which a code was asked for."""
        made = urlsafe_b64encode(sha256(verifier.encode()).digest()).decode().rstrip("=")
        return made == self.challenges.get(code)


@contextlib.contextmanager
def openid_provider() -> Iterator[OpenIDProvider]:
    """Run a provider while the block runs."""
    made = app(user_claims=(User(sub="x"),))
    provider = OpenIDProvider("", requests.Session())

    @made.before_request
    def refuse() -> Any:
        if provider.down:
            return "down", 503
        if flask.request.path == "/oauth2/token":
            code, verifier = (flask.request.form.get(name, "") for name in ("code", "code_verifier"))
            provider.verifiers.append(verifier)
            if not provider.proves(code, verifier):  # the library behind this provider does not look
                return {"error": "invalid_grant", "error_description": "PKCE"}, 400
        return None

    @made.after_request
    def remember(response: Any) -> Any:
        asked, given = flask.request.args, parse_qs(urlsplit(response.headers.get("Location", "")).query)
        if "code" in given and asked.get("code_challenge_method") == "S256":
            provider.challenges[given["code"][0]] = asked.get("code_challenge", "")
        return response

    @made.after_request
    def misname(response: Any) -> Any:
        if provider.claims_to_issuer and flask.request.path.startswith("/.well-known"):
            response.set_data(response.get_data().replace(provider.issuer.encode(), provider.claims_to_issuer.encode()))
        return response

    server = werkzeug.serving.make_server("127.0.0.1", 0, made, threaded=True, request_handler=_Quiet)
    provider.issuer = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    before = os.environ.get("AUTHLIB_INSECURE_TRANSPORT")
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"  # of the provider: it has no certificate
    try:
        yield provider
    finally:
        os.environ.pop("AUTHLIB_INSECURE_TRANSPORT")
        if before is not None:
            os.environ["AUTHLIB_INSECURE_TRANSPORT"] = before
        server.shutdown()
        thread.join()


def sign_otherwise(monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    """Have the provider sign ID tokens with another ``alg`` and ``key``."""
    original = _app.OpenIDCode.get_jwt_config

    def forged(self: Any, *arguments: Any) -> dict[str, Any]:
        return original(self, *arguments) | config

    monkeypatch.setattr(_app.OpenIDCode, "get_jwt_config", forged)


class _Quiet(werkzeug.serving.WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Write no line for a request."""
