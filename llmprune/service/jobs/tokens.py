"""Users of the service: their bearer tokens, of which only digests are stored, and their browser sessions."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.database import Database, IntegrityError

Role = Literal["user", "admin"]
SESSION_SECONDS = 12 * 3600.0
_MAX_SESSIONS = 20  # of one token; the oldest ends
_PREFIX = "llmprune_"  # lets secret scanners recognise a leaked token


@dataclass(frozen=True)
class Caller:
    """A user of the service."""

    name: str
    role: Role

    def may_read(self, owner: str, shared: bool) -> bool:
        """Return whether this caller may see a job of the owner."""
        return shared or self.may_change(owner)

    def may_change(self, owner: str) -> bool:
        """Return whether this caller may cancel, retry or delete a job of the owner."""
        return self.role == "admin" or self.name == owner


LOCAL = Caller("local", "admin")  # every user of this machine, as long as there is no token


@dataclass(frozen=True)
class TokenRecord:
    """A token as the service lists it."""

    name: str
    role: Role
    created: float  # seconds since 1970


class Tokens:
    """The tokens of a service. They are 256 random bits, so a plain SHA-256 cannot be inverted."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, name: str, role: Role) -> str:
        """Make a token; it is never shown again. Raises RecipeError where the name is taken or not allowed."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.@-]{0,63}", name, re.ASCII) or name == "local":
            raise RecipeError(f"--name {name!r}: a name is at most 64 letters, digits and .@_-, and not 'local'")
        token = _PREFIX + secrets.token_urlsafe(32)
        try:
            with self.database.write() as connection:
                connection.execute("INSERT INTO tokens VALUES (?, ?, ?, ?)", (name, role, _digest(token), time.time()))
        except IntegrityError:
            raise RecipeError(f"--name {name!r}: there is a token of this name; revoke it first") from None
        return token

    def revoke(self, name: str) -> None:
        """End a token and its sessions. Raises RecipeError where there is none."""
        with self.database.write() as connection:
            if not connection.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount:
                raise RecipeError(f"--name {name!r}: there is no token of this name")

    def records(self) -> list[TokenRecord]:
        """Return every token."""
        rows = self.database.read("SELECT * FROM tokens")
        return [TokenRecord(row["name"], row["role"], row["created"]) for row in rows]

    def is_current(self, caller: Caller) -> bool:
        """Return whether a caller's token still exists. LOCAL is valid as long as there is no token at all."""
        if caller == LOCAL:
            return not self.records()
        return bool(self.database.read("SELECT 1 FROM tokens WHERE name = ?", (caller.name,)))

    def caller(self, token: str) -> Caller | None:
        """Return the owner of a token; None where there is no such token."""
        rows = self.database.read("SELECT name, role FROM tokens WHERE digest = ?", (_digest(token),))
        return Caller(rows[0]["name"], rows[0]["role"]) if rows else None

    def open_session(self, token: str) -> str | None:
        """Open a session for a browser and return its secret; None where there is no such token."""
        caller = self.caller(token)
        if caller is None:
            return None
        session = secrets.token_urlsafe(32)
        with self.database.write() as connection:
            connection.execute("DELETE FROM sessions WHERE expires < ?", (time.time(),))
            expires = time.time() + SESSION_SECONDS
            connection.execute("INSERT INTO sessions VALUES (?, ?, ?)", (_digest(session), caller.name, expires))
            newest = "SELECT digest FROM sessions WHERE token = ? ORDER BY expires DESC LIMIT ?"
            connection.execute(
                f"DELETE FROM sessions WHERE token = ? AND digest NOT IN ({newest})",
                (caller.name, caller.name, _MAX_SESSIONS),
            )
        return session

    def session_caller(self, session: str) -> Caller | None:
        """Return the owner of a session; None where it has ended."""
        sql = "SELECT name, role FROM tokens JOIN sessions ON token = name WHERE sessions.digest = ? AND expires > ?"
        rows = self.database.read(sql, (_digest(session), time.time()))
        return Caller(rows[0]["name"], rows[0]["role"]) if rows else None

    def close_session(self, session: str) -> None:
        """End a session."""
        with self.database.write() as connection:
            connection.execute("DELETE FROM sessions WHERE digest = ?", (_digest(session),))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
