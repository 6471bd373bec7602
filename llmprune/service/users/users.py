"""Users of the service. A user owns jobs, and signs in with tokens or at an OpenID provider."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llmprune.common.errors import RecipeError
from llmprune.service.database.database import Database, Row, Transaction

Role = Literal["viewer", "user", "approver", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)  # each may do what those before it may
NAME = r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}"
SOURCE = "users"  # of the RecipeErrors of this module
_EMAIL = re.compile(r"[^@\s]{1,100}@[^@\s]{1,150}", re.ASCII)
_COLUMNS = "name, role, email, subject, disabled, created, seen"


@dataclass(frozen=True)
class User:
    """A user of the service."""

    name: str
    role: Role
    email: str | None
    disabled: bool
    created: float  # seconds since 1970
    seen: float | None  # the last request, to within minutes
    signs_in: bool  # has signed in at the OpenID provider


class Users:
    """The users of a service. Errors are RecipeErrors: a wrong name, role or address, or the last admin."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def exist(self) -> bool:
        """Return whether there is any user. Without one the service is open to its own machine."""
        return bool(self.database.read("SELECT 1 FROM users LIMIT 1"))

    def find(self, name: str) -> User | None:
        """Return the user of this name; None where there is none."""
        rows = self.database.read(f"SELECT {_COLUMNS} FROM users WHERE name = ?", (name,))
        return _user_of(rows[0]) if rows else None

    def get(self, name: str) -> User:
        """Return the user of this name. Raises RecipeError where there is none."""
        found = self.find(name)
        if found is None:
            raise no_user(name)
        return found

    def account(self, name: str) -> str:
        """Return what tells a user apart from one who had the name before; empty for users of earlier versions."""
        rows = self.database.read("SELECT account FROM users WHERE name = ?", (name,))
        return str(rows[0]["account"]) if rows else ""

    def all(self) -> list[User]:
        """Return all users by name."""
        return [_user_of(row) for row in self.database.read(f"SELECT {_COLUMNS} FROM users ORDER BY name")]

    def create(self, name: str, role: Role, *, email: str | None = None) -> User:
        """Make a user without tokens. Raises RecipeError where the name is taken or not allowed."""
        with self.database.write() as connection:
            if not add_user(connection, name, role=role, email=email):
                raise RecipeError(f"{name!r}: there is a user of this name", SOURCE)
        return self.get(name)

    def set_role(self, name: str, role: Role) -> None:
        """Change what a user may do. Raises RecipeError for the last admin."""
        self._change(name, role=role)

    def set_email(self, name: str, email: str | None) -> None:
        """Change a user's e-mail address; whoever proves it at the OpenID provider signs in as this user."""
        self._change(name, email=checked_email(email))

    def disable(self, name: str) -> None:
        """Refuse a user's tokens and end the sessions. Jobs are kept. Raises RecipeError for the last admin."""
        self._change(name, disabled=1)

    def enable(self, name: str) -> None:
        """Let a user in again; tokens that were not revoked work again."""
        self._change(name, disabled=0)

    def touch(self, name: str, token: str | None) -> None:
        """Record that a user has sent a request, with this token."""
        now = time.time()
        with self.database.write() as connection:
            connection.execute("UPDATE users SET seen = ? WHERE name = ?", (now, name))
            if token is not None:
                connection.execute("UPDATE tokens SET used = ? WHERE id = ?", (now, token))

    def _change(self, name: str, **values: Any) -> None:
        columns = ", ".join(f"{column} = ?" for column in values)
        with self.database.write() as connection:
            row = connection.execute("SELECT role, disabled FROM users WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise no_user(name)
            connection.execute(f"UPDATE users SET {columns} WHERE name = ?", [*values.values(), name])
            if values.get("disabled"):
                connection.execute("DELETE FROM sessions WHERE owner = ?", (name,))
            if row["role"] == "admin" and not row["disabled"]:
                require_an_admin(connection, name)


def require_an_admin(connection: Transaction, changed: str) -> None:
    """Raise RecipeError where the change of a user has left no admin who may sign in."""
    if not connection.execute("SELECT 1 FROM users WHERE role = 'admin' AND disabled = 0 LIMIT 1").fetchone():
        raise RecipeError(f"{changed} is the last admin; make another user an admin first", SOURCE)


def subject_digest(subject: str) -> str:
    """Return the digest under which the OpenID sign-in of a deleted user is stored."""
    return hashlib.sha256(subject.encode()).hexdigest()


def add_user(
    connection: Transaction, name: str, *, role: Role, email: str | None = None, subject: str | None = None
) -> bool:
    """Add a user in a transaction; return False where there is one of this name. Raises RecipeError."""
    if not re.fullmatch(NAME, name) or name == "local":
        raise RecipeError(f"{name!r}: a name is at most 64 letters, digits and .@_-, and not 'local'", SOURCE)
    sql = (
        "INSERT INTO users (name, role, email, subject, created, account) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (name) DO NOTHING"
    )
    values = (name, role, checked_email(email), subject, time.time(), secrets.token_hex(8))
    added = bool(connection.execute(sql, values).rowcount)
    if added:
        connection.execute("DELETE FROM deleted_users WHERE name = ?", (name,))
    return added


def checked_email(email: str | None) -> str | None:
    """Return an address in lower case; None for an empty one. Raises RecipeError."""
    plain = (email or "").strip().lower()
    if plain and not _EMAIL.fullmatch(plain):
        raise RecipeError(f"{email!r} is no e-mail address; give one such as ann@example.org", SOURCE)
    return plain or None


def _user_of(row: Row) -> User:
    return User(
        name=row["name"],
        role=row["role"],
        email=row["email"],
        disabled=bool(row["disabled"]),
        created=row["created"],
        seen=row["seen"],
        signs_in=row["subject"] is not None,
    )


def no_user(name: str) -> RecipeError:
    """Return the error for a name that no user has."""
    return RecipeError(f"there is no user {name!r}; llmprune user list shows all", SOURCE)
