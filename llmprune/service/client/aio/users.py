"""Methods of the client for admins: users with their tokens, sessions and quotas, and the audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Unpack
from urllib.parse import quote

from llmprune.service.api.accounts.values import (
    AuditEntries,
    AuditEntry,
    MadeToken,
    Moved,
    ShownToken,
    ShownUser,
    UserDetails,
)
from llmprune.service.client.aio.connection import AsyncConnection
from llmprune.service.client.calls import (
    AuditFilters,
    Call,
    QuotaLimits,
    checked_name,
    new_token,
    params_of,
    without_nothing,
)
from llmprune.service.users.tokens import Scope
from llmprune.service.users.users import Role

_PAGE = 100  # entries


class AsyncUserMethods:
    """Users of the service, for admins."""

    connection: AsyncConnection

    async def users(self) -> list[ShownUser]:
        """Return all users by name."""
        return await self.connection.ask(Call("GET", "/v1/users", list[ShownUser]))

    async def user(self, name: str) -> UserDetails:
        """Return a user with usage and quotas."""
        return await self.connection.ask(Call("GET", f"/v1/users/{checked_name(name)}", UserDetails))

    async def create_user(self, name: str, *, role: Role = "user", email: str | None = None) -> ShownUser:
        """Make a user, who signs in at the OpenID provider or with a token of ``make_user_token``."""
        wanted = {"name": name, "role": role, "email": email}
        return await self.connection.ask(Call("POST", "/v1/users", ShownUser, json=wanted))

    async def change_user(
        self, name: str, *, role: Role | None = None, email: str | None = None, disabled: bool | None = None
    ) -> UserDetails:
        """Change a user; what is None stays. ``email``: an empty text removes it. ``disabled``: tokens are refused."""
        changes = without_nothing({"role": role, "email": email, "disabled": disabled})
        return await self.connection.ask(Call("PATCH", f"/v1/users/{checked_name(name)}", UserDetails, json=changes))

    async def delete_user(self, name: str, *, hand_over_to: str | None = None) -> int:
        """Delete a user; return how many jobs were handed over. ``hand_over_to`` is needed where the user has any.

        Tokens, sessions and the draft end at once; no job is deleted, and running ones continue.
        """
        params = {"hand_over_to": hand_over_to}
        return (await self.connection.ask(Call("DELETE", f"/v1/users/{checked_name(name)}", Moved, params))).jobs

    async def set_quotas(self, name: str, **limits: Unpack[QuotaLimits]) -> UserDetails:
        """Give a user quotas in place of earlier ones. ``limits``: queued, running, gpus, disk, per_day, kept.

        None: no limit; one that is left out is the service's.
        """
        quotas = params_of(limits, QuotaLimits)
        path = f"/v1/users/{checked_name(name)}/quotas"
        return await self.connection.ask(Call("PUT", path, UserDetails, json=quotas))

    async def transfer_jobs(self, name: str, *, to: str) -> int:
        """Give all jobs of a user to another one; return how many. ``local``: jobs from before there were users."""
        path = f"/v1/users/{checked_name(name)}/transfer"
        return (await self.connection.ask(Call("POST", path, Moved, json={"to": to}))).jobs

    async def end_user_sessions(self, name: str) -> None:
        """End all browser sessions of a user."""
        await self.connection.answer(Call("DELETE", f"/v1/users/{checked_name(name)}/sessions", dict[str, Any]))

    async def user_tokens(self, name: str) -> list[ShownToken]:
        """Return the tokens of a user; the tokens themselves are not stored."""
        return await self.connection.ask(Call("GET", f"/v1/users/{checked_name(name)}/tokens", list[ShownToken]))

    async def make_user_token(
        self, name: str, token: str = "first", *, scopes: Sequence[Scope] | None = None, days: float | None = None
    ) -> str:
        """Make a token for a user and return it; it is never shown again. ``token``: its name among the user's."""
        wanted = new_token(token, scopes, days=days)
        path = f"/v1/users/{checked_name(name)}/tokens"
        return (await self.connection.ask(Call("POST", path, MadeToken, json=wanted))).token

    async def revoke_user_token(self, name: str, token: str) -> None:
        """Revoke a token of a user, by its id or name, with the sessions that it opened."""
        path = f"/v1/users/{checked_name(name)}/tokens/{quote(token, safe='')}"
        await self.connection.answer(Call("DELETE", path, dict[str, Any]))

    async def audit_page(
        self, *, before: str | None = None, limit: int = 50, **filters: Unpack[AuditFilters]
    ) -> AuditEntries:
        """Return one page of the audit log, the newest entry first. ``before``: the field ``next`` of the page before.

        ``filters``: user, action, job, since, until.
        """
        params = params_of(filters, AuditFilters) | {"before": before, "limit": limit}
        return await self.connection.ask(Call("GET", "/v1/audit", AuditEntries, params))

    async def audit(self, *, limit: int | None = None, **filters: Unpack[AuditFilters]) -> AsyncIterator[AuditEntry]:
        """Yield the entries of the audit log, the newest first, and ask for further pages as they are needed.

        ``limit``: maximum number of entries; ``filters``: as in ``audit_page``.
        """
        before, left = None, limit
        while left is None or left > 0:
            page = await self.audit_page(before=before, limit=_PAGE if left is None else min(_PAGE, left), **filters)
            for entry in page.entries:
                yield entry
            before, left = page.next, None if left is None else left - len(page.entries)
            if before is None:
                return
