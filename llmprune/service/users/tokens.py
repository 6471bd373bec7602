"""Callers of the service, what they may do, and their bearer tokens, of which only digests are stored."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from llmprune.common.errors import RecipeError
from llmprune.service.database.database import Database, Transaction
from llmprune.service.users.users import ROLES, SOURCE, Role, add_user

Scope = Literal["read", "submit", "manage", "approve", "account", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SCOPE_MEANINGS: dict[Scope, str] = {
    "read": "see jobs, results and plans",
    "submit": "submit jobs",
    "manage": "cancel, retry, push, share and delete own jobs",
    "approve": "approve models",
    "account": "make and revoke own tokens",
    "admin": "change every job, manage users, read the audit log",
}
SCOPES_OF: dict[Role, frozenset[Scope]] = {
    "viewer": frozenset({"read", "account"}),
    "user": frozenset({"read", "submit", "manage", "account"}),
    "approver": frozenset({"read", "submit", "manage", "account", "approve"}),
    "admin": frozenset(SCOPES),
}
MAX_TOKENS = 50  # of one user
_PREFIX = "llmprune_"  # lets secret scanners recognise a leaked token
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@ -]{0,63}")


class AccessEnded(Exception):
    """The token was valid once. ``status``: 401 where another token helps, 403 where only an admin helps."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Caller:
    """A user as one request may act. ``role``: the user's, or a lower one where the token's scopes allow no more."""

    name: str
    role: Role
    scopes: frozenset[Scope] = frozenset(SCOPES)  # of the token
    token: str | None = field(default=None, compare=False)  # id of the token; None: the OpenID provider, or LOCAL
    session: str | None = field(default=None, compare=False)  # id of the browser session

    def may(self, scope: Scope) -> bool:
        """Return whether both the role and the token allow requests of this kind."""
        return scope in SCOPES_OF[self.role] and scope in self.scopes

    def may_read(self, owner: str, shared: bool) -> bool:
        """Return whether this caller may see a job of the owner."""
        return shared or self.role == "admin" or self.name == owner

    def may_change(self, owner: str) -> bool:
        """Return whether this caller may cancel, retry, push, share or delete a job of the owner."""
        return self.may("manage") and (self.role == "admin" or self.name == owner)

    def may_approve(self) -> bool:
        """Return whether this caller may set the stage of a model to approved."""
        return self.may("approve")


LOCAL = Caller("local", "admin")  # every user of this machine, as long as there is no user


def limited_caller(
    name: str, role: Role, *, scopes: frozenset[Scope], token: str | None, session: str | None = None
) -> Caller:
    """Return a caller whose role is the highest one that needs no scope beyond the token's."""
    if role == "admin" and "admin" not in scopes:
        role = "approver"
    if role == "approver" and "approve" not in scopes:
        role = "user"
    if role == "user" and not scopes & {"submit", "manage"}:
        role = "viewer"
    return Caller(name, role, scopes, token=token, session=session)


@dataclass(frozen=True)
class TokenRecord:
    """A token as lists show it. ``role``: of its owner; times are seconds since 1970."""

    id: str
    owner: str
    name: str
    role: Role
    scopes: tuple[Scope, ...]
    created: float
    expires: float | None
    used: float | None

    @property
    def effective_scopes(self) -> tuple[Scope, ...]:
        """Scopes that its owner's role allows too."""
        return tuple(scope for scope in self.scopes if scope in SCOPES_OF[self.role])

    @property
    def expired(self) -> bool:
        """True where the token is refused because of its age."""
        return self.expires is not None and self.expires <= time.time()


class Tokens:
    """The tokens of a service. They are 256 random bits, so a plain SHA-256 cannot be inverted."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self,
        owner: str,
        role: Role | None = None,
        *,
        name: str = "first",
        scopes: Collection[Scope] = SCOPES,
        days: float | None = None,
    ) -> str:
        """Make a token of a user, who is made too where ``role`` is given and there is none of this name.

        It is never shown again. A role below that of a known user limits the token. ``days``: until it expires.
        Raises RecipeError.
        """
        _check(name, scopes=scopes, days=days)
        token = _PREFIX + secrets.token_urlsafe(32)
        found, now = digest_of(token), time.time()
        expires = None if days is None else now + days * 86_400
        with self.database.write() as connection:
            if role is not None and not add_user(connection, owner, role=role):
                _require_role(connection, owner, role=role)
                scopes = [scope for scope in scopes if scope in SCOPES_OF[role]]
            if connection.execute("SELECT 1 FROM users WHERE name = ?", (owner,)).fetchone() is None:
                raise RecipeError(f"there is no user {owner!r}; make one with a --role", SOURCE)
            held = connection.execute("SELECT name FROM tokens WHERE owner = ?", (owner,)).fetchall()
            if any(row["name"] == name for row in held):
                raise RecipeError(
                    f"{owner} has a token {name!r}: there is a token of this name; revoke it first, or choose another",
                    SOURCE,
                )
            if len(held) >= MAX_TOKENS:
                raise RecipeError(f"{owner} has {len(held)} tokens, and {MAX_TOKENS} are allowed; revoke one", SOURCE)
            sql = "INSERT INTO tokens (id, owner, name, digest, scopes, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?)"
            listed = " ".join(scope for scope in SCOPES if scope in scopes)
            connection.execute(sql, (found[:12], owner, name, found, listed, now, expires))
        return token

    def revoke(self, owner: str, token: str | None = None) -> None:
        """End a user's token of this id or name, or all, with the sessions that they opened. Raises RecipeError."""
        chosen, values = ("", [owner]) if token is None else (" AND (id = ? OR name = ?)", [owner, token, token])
        with self.database.write() as connection:
            if not connection.execute(f"DELETE FROM tokens WHERE owner = ?{chosen}", values).rowcount:
                which = "no token" if token is None else f"no token {token!r}"
                raise RecipeError(f"{owner!r} has {which}; llmprune token list shows all", SOURCE)

    def records(self, owner: str | None = None) -> list[TokenRecord]:
        """Return the tokens of a user; None: of all users."""
        where, values = ("", ()) if owner is None else (" WHERE owner = ?", (owner,))
        sql = f"SELECT t.*, role FROM tokens t JOIN users u ON u.name = t.owner{where} ORDER BY t.owner, t.created"
        return [
            TokenRecord(
                id=row["id"],
                owner=row["owner"],
                name=row["name"],
                role=row["role"],
                scopes=tuple(scope for scope in SCOPES if scope in scopes_of(row["scopes"])),
                created=row["created"],
                expires=row["expires"],
                used=row["used"],
            )
            for row in self.database.read(sql, values)
        ]

    def owner_role(self, owner: str) -> Role | None:
        """Return the role of a user; None where there is none of this name."""
        rows = self.database.read("SELECT role FROM users WHERE name = ?", (owner,))
        return rows[0]["role"] if rows else None

    def is_current(self, caller: Caller) -> bool:
        """Return whether a caller may still act. LOCAL may as long as there is no user at all."""
        if caller == LOCAL:
            return not self.database.read("SELECT 1 FROM users LIMIT 1")
        kind, id = ("tokens", caller.token) if caller.session is None else ("sessions", caller.session)
        sql = f"SELECT 1 FROM {kind} t JOIN users u ON u.name = t.owner WHERE t.id = ? AND disabled = 0"
        return bool(self.database.read(f"{sql} AND (t.expires IS NULL OR t.expires > ?)", (id, time.time())))

    def caller(self, token: str) -> Caller | None:
        """Return the owner of a token; None where there is none. Raises AccessEnded for an expired or disabled one."""
        sql = "SELECT t.id, t.owner, t.scopes, t.expires, u.role, u.disabled FROM tokens t"
        rows = self.database.read(f"{sql} JOIN users u ON u.name = t.owner WHERE t.digest = ?", (digest_of(token),))
        if not rows:
            return None
        row = rows[0]
        if row["disabled"]:
            raise AccessEnded(f"the user {row['owner']} is disabled; ask an admin", 403)
        if row["expires"] is not None and row["expires"] <= time.time():
            day = time.strftime("%Y-%m-%d", time.gmtime(row["expires"]))
            raise AccessEnded(f"this token expired on {day}; make another on the Account page, or ask an admin", 401)
        return limited_caller(row["owner"], row["role"], scopes=scopes_of(row["scopes"]), token=row["id"])


def digest_of(secret: str) -> str:
    """Return the digest under which a secret is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def scopes_of(stored: str) -> frozenset[Scope]:
    """Return the scopes of a column."""
    return frozenset(scope for scope in SCOPES if scope in stored.split())


def _check(name: str, *, scopes: Collection[Scope], days: float | None) -> None:
    """Raise RecipeError for a name, scopes or an age that no token can have."""
    if not _LABEL.fullmatch(name):
        raise RecipeError(f"{name!r}: a token's name is at most 64 letters, digits, spaces and .@_-", SOURCE)
    wrong = sorted(set(scopes) - set(SCOPES))
    if wrong or not scopes:
        raise RecipeError(f"scopes: {', '.join(wrong) or 'none given'}; choose from {', '.join(SCOPES)}", SOURCE)
    if days is not None and not 0 < days <= 3660:
        raise RecipeError(f"expires: {days:g} days; give more than 0 and at most 3660", SOURCE)


def _require_role(connection: Transaction, owner: str, *, role: Role) -> None:
    """Raise RecipeError where a user is disabled or has a lower role than the one that was asked for."""
    row = connection.execute("SELECT role, disabled FROM users WHERE name = ?", (owner,)).fetchone()
    if row["disabled"]:
        raise RecipeError(f"the user {owner} is disabled; enable the user first", SOURCE)
    if ROLES.index(row["role"]) < ROLES.index(role):
        raise RecipeError(f"{owner} has the role {row['role']}; change it with llmprune user set-role", SOURCE)
