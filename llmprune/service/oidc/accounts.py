"""The user behind a sign-in at the OpenID provider: found by subject, by verified e-mail address, or made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmprune.common.errors import RecipeError
from llmprune.service.database.database import Database
from llmprune.service.jobs.store_reads import first_row
from llmprune.service.oidc.provider import SignInRefused
from llmprune.service.oidc.settings import OidcSettings
from llmprune.service.users.users import NAME, ROLES, Role, add_user, subject_digest

_MAX_CLAIM = 300  # characters


def user_of(claims: Mapping[str, Any], settings: OidcSettings, *, database: Database) -> str:
    """Return the name of the user whom the claims describe, who is made at the first sign-in. Raises SignInRefused."""
    subject, email = f"{settings.issuer} {_text(claims, 'sub')}", _verified_email(claims)
    _require_domain(email, settings)
    role = _role(claims, settings)
    with database.write() as connection:
        found = first_row(connection, "SELECT name, disabled FROM users WHERE subject = ?", subject)
        if found is None and email is not None:
            sql = "SELECT name, disabled FROM users WHERE email = ? AND subject IS NULL"
            found = first_row(connection, sql, email)
        if found is not None and found["disabled"]:
            raise SignInRefused(f"the user {found['name']} is disabled; ask an admin")
        if found is None:
            _require_not_deleted(connection, _name(claims, settings), subject=subject)
            return _add(connection, _name(claims, settings), role=role, email=email, subject=subject)
        name = str(found["name"])
        connection.execute(
            "UPDATE users SET subject = ?, email = coalesce(?, email) WHERE name = ?", (subject, email, name)
        )
        if settings.roles:
            connection.execute("UPDATE users SET role = ? WHERE name = ?", (role, name))
        return name


def _require_not_deleted(connection: Any, name: str, *, subject: str) -> None:
    """Raise SignInRefused for a person whose user was deleted: only an admin makes the user again."""
    sql = "SELECT name FROM deleted_users WHERE subject = ? OR name = ?"
    deleted = first_row(connection, sql, subject_digest(subject), name)
    if deleted is not None:
        raise SignInRefused(
            f"the user {deleted['name']} was deleted here; ask an admin to make a user with your e-mail address, or to "
            f"run llmprune user enable {deleted['name']}"
        )


def _add(connection: Any, name: str, *, role: Role, email: str | None, subject: str) -> str:
    try:
        if add_user(connection, name, role=role, email=email, subject=subject):
            return name
    except RecipeError as error:
        raise SignInRefused(f"the provider's name for you cannot be a user's: {error.problems[0]}") from error
    raise SignInRefused(
        f"the name {name!r} belongs to a user who does not sign in here; if that is you, ask an admin to set "
        "your e-mail address for it"
    )


def _name(claims: Mapping[str, Any], settings: OidcSettings) -> str:
    """Return the name for a new user. Raises SignInRefused where the claim holds none."""
    name = _text(claims, settings.name_claim)
    if not re.fullmatch(NAME, name):
        raise SignInRefused(
            f"the provider's claim {settings.name_claim!r} is {name[:80]!r}, which is no name for a user: at most 64 "
            "letters, digits and .@_-; the operator can choose another with --oidc-name-claim"
        )
    return name


def _role(claims: Mapping[str, Any], settings: OidcSettings) -> Role:
    """Return the highest role that the groups give. Raises SignInRefused where they give none."""
    stated = claims.get(settings.groups_claim, [])
    groups = {stated} if isinstance(stated, str) else {one for one in stated if isinstance(one, str)}
    given = [role for group, role in settings.roles if group in groups]
    if given:
        return max(given, key=ROLES.index)
    if settings.default_role is None:
        raise SignInRefused("your account is in no group that may use this service; ask an admin")
    return settings.default_role


def _verified_email(claims: Mapping[str, Any]) -> str | None:
    email = claims.get("email")
    is_verified = claims.get("email_verified") in (True, "true")
    return email.strip().lower() if isinstance(email, str) and is_verified and len(email) <= _MAX_CLAIM else None


def _require_domain(email: str | None, settings: OidcSettings) -> None:
    """Raise SignInRefused for an address outside of the allowed domains."""
    if not settings.domains:
        return
    domain = (email or "").rpartition("@")[2]
    if domain not in {name.lower() for name in settings.domains}:
        shown = email or "which the provider has not verified"
        raise SignInRefused(f"your e-mail address, {shown}, is not of {', '.join(settings.domains)}; ask an admin")


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not value or len(value) > _MAX_CLAIM:
        raise SignInRefused(f"the provider tells no claim {name!r} about you; ask the operator")
    return value
