"""A service with an OpenID provider, and a browser in front of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.openid_provider import OpenIDProvider
from helpers.service import BASE, ServiceHarness
from llmprune.service.oidc.settings import OidcSettings

HTML = {"Accept": "text/html"}


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


def refused(answer: Any, status: int, sentence: str) -> None:
    """Check that a sign-in was refused with a sentence, and opened no session."""
    assert (answer.status_code, sentence in answer.text.replace("&#39;", "'")) == (status, True), answer.text
    assert "llmprune_session" not in str(answer.headers.get("Set-Cookie"))
