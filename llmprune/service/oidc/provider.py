"""OpenID provider: discovery, authorization code flow with PKCE, and checks of the ID token, all by Authlib."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from llmprune.common.errors import RecipeError
from llmprune.service.oidc.settings import OidcSettings

logger = logging.getLogger(__name__)

INSTALL = "sign-in at an OpenID provider needs Authlib: pip install 'llmprune[oidc]'"
_SIGNED = re.compile(r"(?:RS|PS|ES)\d{3}K?|EdDSA|Ed25519|Ed448")  # algorithms with a public key
_TIMEOUT = 10.0  # seconds for an answer of the provider
_RELOAD_AFTER = 3600.0  # seconds after which the provider is discovered again
_MAX_CALLS = 4  # sign-ins that may wait for the provider at a time: each takes a thread of the server
_LEEWAY = 60  # seconds that the clocks of provider and service may differ
_REQUIRED = ("authorization_endpoint", "token_endpoint", "jwks_uri", "issuer")


class SignInRefused(Exception):
    """The provider, or what it said, does not let this person in. ``status``: of the answer."""

    def __init__(self, reason: str, status: int = 403) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Flow:
    """A sign-in under way, kept by the browser until the provider sends it back."""

    state: str
    nonce: str
    verifier: str  # of PKCE


class Provider:
    """Client of one OpenID provider. Raises RecipeError where Authlib is not installed."""

    def __init__(self, settings: OidcSettings) -> None:
        settings.check()
        self.settings = settings
        self._app_class = _app_class()
        self._known: tuple[float, Any] | None = None
        self._calls = threading.BoundedSemaphore(_MAX_CALLS)

    def begin(self, redirect_uri: str) -> tuple[str, Flow]:
        """Return the provider's address that asks a person to sign in, and the flow to keep. Raises SignInRefused."""
        with self._calling():
            made = self._app().create_authorization_url(redirect_uri)
        return made["url"], Flow(made["state"], made["nonce"], made["code_verifier"])

    def finish(self, flow: Flow, answer: Mapping[str, str], *, redirect_uri: str) -> dict[str, Any]:
        """Exchange the code of the provider's answer; return the claims of the person. Raises SignInRefused."""
        if not flow.state or answer.get("state") != flow.state:
            raise SignInRefused("this sign-in was not begun in this browser, or too long ago; sign in again", 401)
        if "error" in answer:
            reason = answer.get("error_description") or answer["error"]
            raise SignInRefused(f"the provider refused the sign-in: {reason[:200]}", 401)
        if answer.get("iss") not in (None, self.settings.issuer):
            raise SignInRefused("the answer comes from another provider; sign in again", 401)
        with self._calling():
            app = self._app()
            token = app.fetch_access_token(redirect_uri, code=answer.get("code", ""), code_verifier=flow.verifier)
            claims = app.parse_id_token(token, flow.nonce, claims_options=self._checks(app), leeway=_LEEWAY)
            if claims is None:
                raise SignInRefused("the provider sent no ID token; its client needs the scope openid", 502)
            return self._completed(app, dict(claims), token=token)

    def sign_out_address(self, back: str) -> str | None:
        """Return the provider's address that ends a person's session there; None where it has none."""
        try:
            with self._calling():
                end = self._app().load_server_metadata().get("end_session_endpoint")
        except SignInRefused:
            return None
        asked = urlencode({"client_id": self.settings.client_id, "post_logout_redirect_uri": back})
        return f"{end}{'&' if '?' in end else '?'}{asked}" if end else None

    def _checks(self, app: Any) -> dict[str, Any]:
        """Return what the ID token must hold: it was issued by this provider for this client, and has not expired."""
        return {
            "iss": {"essential": True, "value": app.load_server_metadata()["issuer"]},
            "aud": {"essential": True, "value": self.settings.client_id},
            "exp": {"essential": True},
        }

    def _completed(self, app: Any, claims: dict[str, Any], *, token: Mapping[str, Any]) -> dict[str, Any]:
        """Add claims that only the provider's userinfo endpoint tells."""
        wanted = {self.settings.name_claim, "email", *([self.settings.groups_claim] if self.settings.roles else [])}
        if wanted <= claims.keys() or not app.load_server_metadata().get("userinfo_endpoint"):
            return claims
        more = dict(app.userinfo(token=token))
        if more.get("sub") != claims["sub"]:
            raise SignInRefused("the provider's userinfo is of another person; tell the operator", 502)
        return more | claims

    def _app(self) -> Any:
        """Return Authlib's client with the provider's metadata, which are loaded again from time to time."""
        if self._known is not None and time.monotonic() - self._known[0] < _RELOAD_AFTER:
            return self._known[1]
        app = self._app_class(
            None,
            "provider",
            client_id=self.settings.client_id,
            client_secret=self.settings.secret(),
            server_metadata_url=f"{self.settings.issuer.rstrip('/')}/.well-known/openid-configuration",
            client_kwargs={
                "scope": self.settings.scopes,
                "code_challenge_method": "S256",
                "default_timeout": _TIMEOUT,
                **({} if self.settings.secret_file else {"token_endpoint_auth_method": "none"}),
            },
        )
        metadata = app.load_server_metadata()
        self._require_known(metadata)
        stated = metadata.get("id_token_signing_alg_values_supported", ["RS256"])
        # a provider may list "none", and a shared secret proves less than its key
        metadata["id_token_signing_alg_values_supported"] = [one for one in stated if _SIGNED.fullmatch(str(one))]
        self._known = time.monotonic(), app
        return app

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Count a call of the provider while the block runs. Raises SignInRefused where too many wait for it."""
        if not self._calls.acquire(timeout=1.0):
            raise SignInRefused("many sign-ins are under way; try again in a moment", 503)
        try:
            with _explained():
                yield
        finally:
            self._calls.release()

    def _require_known(self, metadata: Mapping[str, Any]) -> None:
        """Raise SignInRefused where discovery answered for another issuer or misses an endpoint."""
        missing = [name for name in _REQUIRED if not isinstance(metadata.get(name), str)]
        if missing:
            raise SignInRefused(f"the provider's discovery has no {', '.join(missing)}; tell the operator", 502)
        if metadata["issuer"].rstrip("/") != self.settings.issuer.rstrip("/"):
            raise SignInRefused(
                f"the provider calls itself {metadata['issuer'][:200]!r} and not {self.settings.issuer!r}; "
                "the operator has to give that as --oidc-issuer",
                502,
            )


@contextmanager
def _explained() -> Iterator[None]:
    """Turn the errors of Authlib and of the network into SignInRefused."""
    import requests
    from authlib.common.errors import AuthlibBaseError
    from joserfc.errors import JoseError

    try:
        yield
    except SignInRefused:
        raise
    except (JoseError, AuthlibBaseError) as error:
        logger.warning("a sign-in at the OpenID provider was refused: %s", error)
        what = getattr(error, "description", "") or str(error)
        raise SignInRefused(f"the provider's answer is not valid ({what[:200]}); sign in again", 401) from error
    except (requests.RequestException, OSError) as error:
        logger.warning("the OpenID provider does not answer: %s", error)
        raise SignInRefused("the OpenID provider does not answer; try again, or sign in with a token", 503) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        logger.warning("the OpenID provider's answer cannot be read: %r", error)
        raise SignInRefused("the OpenID provider's answer cannot be read; tell the operator", 502) from error


def _app_class() -> Callable[..., Any]:
    """Return Authlib's OpenID client over requests. Raises RecipeError where it is not installed."""
    try:
        from authlib.integrations.base_client import BaseApp, OAuth2Mixin, OpenIDMixin
        from authlib.integrations.requests_client import OAuth2Session
    except ImportError:
        raise RecipeError(INSTALL) from None

    class App(OAuth2Mixin, OpenIDMixin, BaseApp):  # type: ignore[misc]  # Authlib has no types
        client_cls = OAuth2Session

    return App
