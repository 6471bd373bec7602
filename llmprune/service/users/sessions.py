"""Browser sessions. A cookie holds the secret of a session, of which only the digest is stored."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from llmprune.common.printing import printable
from llmprune.service.database.database import Database
from llmprune.service.users.tokens import SCOPES, Caller, Tokens, digest_of, limited_caller, scopes_of

SESSION_SECONDS = 12 * 3600.0
_MAX_SESSIONS = 20  # of one user; the oldest ends
_MAX_BROWSER = 160  # characters of a User-Agent header


@dataclass(frozen=True)
class Session:
    """A session as lists show it. ``token``: name of the token that opened it; None: the OpenID provider."""

    id: str
    browser: str
    token: str | None
    created: float  # seconds since 1970
    expires: float


class Sessions:
    """The sessions of a service."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def open_with(self, token: str, browser: str = "") -> str | None:
        """Open a session by a token and return its secret; None where there is no such token. Raises AccessEnded."""
        caller = Tokens(self.database).caller(token)
        return self.open(caller.name, caller.token, browser=browser) if caller else None

    def open(self, owner: str, token: str | None, *, browser: str) -> str:
        """Open a session of a user and return its secret. ``token``: id of the token that it has the scopes of."""
        secret, now = secrets.token_urlsafe(32), time.time()
        digest, shown = digest_of(secret), printable(browser)[:_MAX_BROWSER]
        with self.database.write() as connection:
            connection.execute("DELETE FROM sessions WHERE expires < ?", (now,))
            sql = "INSERT INTO sessions (id, digest, owner, token, browser, created, expires)"
            values = (digest[:12], digest, owner, token, shown, now, now + SESSION_SECONDS)
            connection.execute(f"{sql} VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            newest = "SELECT id FROM sessions WHERE owner = ? ORDER BY created DESC LIMIT ?"
            connection.execute(
                f"DELETE FROM sessions WHERE owner = ? AND id NOT IN ({newest})", (owner, owner, _MAX_SESSIONS)
            )
        return secret

    def caller(self, secret: str) -> Caller | None:
        """Return the owner of a session; None where it has ended, or its token has."""
        sql = (
            "SELECT s.id, u.name, u.role, s.token, t.scopes FROM sessions s JOIN users u ON u.name = s.owner "
            "LEFT JOIN tokens t ON t.id = s.token "
            "WHERE s.digest = ? AND s.expires > ? AND u.disabled = 0 AND (t.expires IS NULL OR t.expires > ?)"
        )
        now = time.time()
        rows = self.database.read(sql, (digest_of(secret), now, now))
        if not rows:
            return None
        row = rows[0]
        scopes = frozenset(SCOPES) if row["token"] is None else scopes_of(row["scopes"])
        return limited_caller(row["name"], row["role"], scopes=scopes, token=row["token"], session=row["id"])

    def of(self, owner: str) -> list[Session]:
        """Return a user's sessions, the newest first."""
        sql = (
            "SELECT s.id, s.browser, t.name AS token, s.created, s.expires FROM sessions s "
            "LEFT JOIN tokens t ON t.id = s.token WHERE s.owner = ? AND s.expires > ? ORDER BY s.created DESC"
        )
        return [Session(**dict(row)) for row in self.database.read(sql, (owner, time.time()))]

    def close(self, secret: str) -> None:
        """End a session."""
        with self.database.write() as connection:
            connection.execute("DELETE FROM sessions WHERE digest = ?", (digest_of(secret),))

    def end_all(self, owner: str) -> int:
        """End all sessions of a user; return how many there were."""
        with self.database.write() as connection:
            return int(connection.execute("DELETE FROM sessions WHERE owner = ?", (owner,)).rowcount)
