"""A service with a user of each role."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from helpers.service import ServiceHarness
from llmprune.service.users.users import ROLES

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
