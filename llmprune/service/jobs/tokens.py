"""Who calls: bearer tokens, of which only digests are kept, and the browser sessions that they open."""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from typing import Literal

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.database import Database

Role = Literal["user", "admin"]
SESSION_SECONDS = 12 * 3600.0
_MOST_SESSIONS = 20  # of one token; the oldest ends
_PREFIX = "llmprune_"  # lets scanners of repositories recognise a leaked token


@dataclass(frozen=True)
class Caller:
    """Somebody who may use the service."""

    name: str
    role: Role

    def may_read(self, owner: str, shared: bool) -> bool:
        """Whether this caller may see the owner's job."""
        return shared or self.may_change(owner)

    def may_change(self, owner: str) -> bool:
        """Whether this caller may cancel, retry or delete the owner's job."""
        return self.role == "admin" or self.name == owner


LOCAL = Caller("local", "admin")  # everybody on this machine, as long as there is no token


class Tokens:
    """The tokens of a service. They are 256 random bits, so a plain SHA-256 cannot be turned around."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, name: str, role: Role) -> str:
        """A new token, which is shown this once. Raises RecipeError where the name is taken or odd."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.@-]{0,63}", name, re.ASCII) or name == "local":
            raise RecipeError(f"--name {name!r}: a name is at most 64 letters, digits and .@_-, and not 'local'")
        token = _PREFIX + secrets.token_urlsafe(32)
        try:
            with self.database.write() as connection:
                connection.execute("INSERT INTO tokens VALUES (?, ?, ?, ?)", (name, role, _digest(token), time.time()))
        except sqlite3.IntegrityError:
            raise RecipeError(f"--name {name!r}: there is a token of this name; revoke it first") from None
        return token

    def revoke(self, name: str) -> None:
        """End a token and its sessions. Raises RecipeError where there is none."""
        with self.database.write() as connection:
            if not connection.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount:
                raise RecipeError(f"--name {name!r}: there is no token of this name")

    def everyone(self) -> list[tuple[str, Role, float]]:
        """Name, role and time of creation of each."""
        return [(row["name"], row["role"], row["created"]) for row in self.database.read("SELECT * FROM tokens")]

    def is_current(self, caller: Caller) -> bool:
        """Whether a caller's token still exists; without any token the service is open, to LOCAL alone."""
        if caller == LOCAL:
            return not self.everyone()
        return bool(self.database.read("SELECT 1 FROM tokens WHERE name = ?", (caller.name,)))

    def caller(self, token: str) -> Caller | None:
        """Whose token this is."""
        rows = self.database.read("SELECT name, role FROM tokens WHERE digest = ?", (_digest(token),))
        return Caller(rows[0]["name"], rows[0]["role"]) if rows else None

    def open_session(self, token: str) -> str | None:
        """A session for a browser; None where there is no such token."""
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
                (caller.name, caller.name, _MOST_SESSIONS),
            )
        return session

    def session_caller(self, session: str) -> Caller | None:
        """Whose session this is, while it lasts."""
        sql = "SELECT name, role FROM tokens JOIN sessions ON token = name WHERE sessions.digest = ? AND expires > ?"
        rows = self.database.read(sql, (_digest(session), time.time()))
        return Caller(rows[0]["name"], rows[0]["role"]) if rows else None

    def close_session(self, session: str) -> None:
        """End a session."""
        with self.database.write() as connection:
            connection.execute("DELETE FROM sessions WHERE digest = ?", (_digest(session),))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
