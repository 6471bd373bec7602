"""Address and token of a service, and the reasons why it cannot be reached."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Self

import httpx2 as httpx

from llmprune.common.errors import RecipeError, ServiceUnreachable
from llmprune.common.hub.errors import retry_after_seconds
from llmprune.service.client.answers import Answer
from llmprune.service.client.calls import require_plain

DEFAULT_SERVER = "http://127.0.0.1:8321"
TRIES = 6
LONGEST_PAUSE = 10.0  # seconds that a service may ask for
_FIRST_PAUSE = 0.3  # seconds; doubles
_BUSY = (429, 503, 507)
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)


@dataclass(frozen=True)
class Server:
    """A service's address, without a slash at its end, and the token for it."""

    address: str
    token: str

    @classmethod
    def of(cls, address: str | None, token: str | None) -> Self:
        """Return what was given, or else the variables LLMPRUNE_SERVER and LLMPRUNE_TOKEN. Raises RecipeError."""
        address = address or os.environ.get("LLMPRUNE_SERVER", "").strip() or DEFAULT_SERVER
        token = token or os.environ.get("LLMPRUNE_TOKEN", "").strip()
        require_plain(token, "the service's token")
        if not re.match(r"https?://[^/]", address.rstrip("/")):
            raise RecipeError(f"--server {address!r}: give a URL such as {DEFAULT_SERVER}")
        return cls(address.rstrip("/"), token)

    def http_options(self, timeout: float, transport: Any) -> dict[str, Any]:
        """Return the arguments of an httpx client."""
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        return {"base_url": self.address, "headers": headers, "timeout": timeout, "transport": transport}

    def invalid(self, error: Exception) -> RecipeError:
        """Return the error for an address that httpx does not take."""
        return RecipeError(f"--server {self.address}: {error}; give a URL such as {DEFAULT_SERVER}")

    def unreachable(self, error: Exception) -> ServiceUnreachable:
        """Return the error for a connection that cannot be made, or breaks."""
        why = f"{self.address} cannot be reached"
        if isinstance(error, httpx.ReadError | httpx.ReadTimeout | httpx.RemoteProtocolError):
            why = f"{self.address} does not finish its answer"
        return ServiceUnreachable(
            f"{why}: {error or type(error).__name__}; is llmprune serve running there? see --server"
        )


class Attempts:
    """Attempts at one request, and the pause before the next one."""

    def __init__(self, server: Server) -> None:
        self._server, self._failed = server, 0

    def succeeded(self) -> None:
        """Count from the beginning again: the request made progress."""
        self._failed = 0

    def after_break(self, error: Exception, *, kinds: tuple[type[Exception], ...] = _BROKEN) -> float:
        """Return the pause after a connection that broke. Raises ServiceUnreachable where a repetition is of no use.

        ``kinds``: errors after which the request is repeated.
        """
        self._failed += 1
        if self._failed >= TRIES or not isinstance(error, kinds):
            raise self._server.unreachable(error) from error
        return _FIRST_PAUSE * 2.0 ** (self._failed - 1)

    def after_refusal(self, answer: Answer) -> float:
        """Return the pause that a busy service asks for. Raises what the answer reports where it is not busy.

        A limit (429) that lasts longer than ``LONGEST_PAUSE`` is not waited for, such as a quota that is reached.
        """
        self._failed += 1
        wait = retry_after_seconds(answer.headers.get("Retry-After", ""))
        pause = 1.0 if wait is None else wait
        is_lasting = answer.status == 429 and pause > LONGEST_PAUSE
        if self._failed >= TRIES or answer.status not in _BUSY or is_lasting:
            raise answer.refusal()
        return min(pause, LONGEST_PAUSE)
