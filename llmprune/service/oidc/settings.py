"""Settings of the sign-in at an OpenID provider, which the operator gives with ``llmprune serve``."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from llmprune.common.errors import RecipeError
from llmprune.service.users.users import Role

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class OidcSettings(BaseModel):
    """An OpenID provider, and what its claims mean to the service."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuer: str
    client_id: str
    secret_file: Path | None = None  # None: a public client, which PKCE alone protects
    scopes: str = "openid profile email"
    name_claim: str = "preferred_username"  # becomes the name of a new user
    groups_claim: str = "groups"
    roles: tuple[tuple[str, Role], ...] = ()  # group and role; the highest role holds, at each sign-in
    default_role: Role | None = "user"  # of those in no such group; None: they may not sign in
    domains: tuple[str, ...] = ()  # of verified e-mail addresses; empty: any

    @property
    def host(self) -> str:
        """Name of the provider for people."""
        return urlsplit(self.issuer).netloc

    def secret(self) -> str | None:
        """Read the client's secret. Raises RecipeError."""
        if self.secret_file is None:
            return None
        try:
            found = self.secret_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise RecipeError(f"--oidc-client-secret-file {self.secret_file} cannot be read: {error}") from error
        if not found:
            raise RecipeError(f"--oidc-client-secret-file {self.secret_file} is empty; give a file with the secret")
        return found

    def check(self) -> None:
        """Raise RecipeError where the settings cannot work."""
        parts = urlsplit(self.issuer)
        if parts.scheme not in ("https", "http") or not parts.netloc or parts.query or parts.fragment:
            raise RecipeError(
                f"--oidc-issuer {self.issuer!r}: give its URL, such as https://id.example.org/realms/team"
            )
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise RecipeError(f"--oidc-issuer {self.issuer!r}: an issuer on another machine needs https")
        if "openid" not in self.scopes.split():
            raise RecipeError(f"--oidc-scopes {self.scopes!r} has no 'openid'; add it")
        self.secret()
