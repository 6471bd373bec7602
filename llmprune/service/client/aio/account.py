"""Methods of the client for the caller's own account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from llmprune.service.api.accounts.values import Account, MadeToken, ShownSession, ShownToken
from llmprune.service.client.aio.connection import AsyncConnection
from llmprune.service.client.calls import Call, new_token
from llmprune.service.users.tokens import Scope


class AsyncAccountMethods:
    """Account of the caller: usage and quotas, tokens, browser sessions."""

    connection: AsyncConnection

    async def account(self) -> Account:
        """Return who the caller is and may do, and how much of each quota is used."""
        return await self.connection.ask(Call("GET", "/v1/account", Account))

    async def tokens(self) -> list[ShownToken]:
        """Return your tokens; the tokens themselves are not stored."""
        return await self.connection.ask(Call("GET", "/v1/account/tokens", list[ShownToken]))

    async def make_token(self, name: str, *, scopes: Sequence[Scope] | None = None, days: float | None = None) -> str:
        """Make a token for yourself and return it; it is never shown again.

        ``scopes``: what it may do; None: everything that this client's token may. ``days``: until it expires.
        """
        wanted = new_token(name, scopes, days=days)
        return (await self.connection.ask(Call("POST", "/v1/account/tokens", MadeToken, json=wanted))).token

    async def revoke_token(self, token: str) -> None:
        """Revoke one of your tokens, by its id or name, with the sessions that it opened."""
        await self.connection.answer(Call("DELETE", f"/v1/account/tokens/{quote(token, safe='')}", dict[str, Any]))

    async def sessions(self) -> list[ShownSession]:
        """Return your browser sessions, the newest first."""
        return await self.connection.ask(Call("GET", "/v1/account/sessions", list[ShownSession]))

    async def end_sessions(self) -> None:
        """End all of your browser sessions."""
        await self.connection.answer(Call("DELETE", "/v1/account/sessions", dict[str, Any]))
