"""Options of ``llmprune serve`` for the sign-in at an OpenID provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmprune.common.errors import RecipeError

if TYPE_CHECKING:
    from llmprune.service.oidc.settings import OidcSettings
    from llmprune.service.users.users import Role

Issuer = Annotated[
    str | None,
    typer.Option(metavar="URL", help="OpenID provider at which people sign in, such as https://id.example.org."),
]
ClientId = Annotated[str | None, typer.Option(metavar="ID", help="The service's client id at the provider.")]
SecretFile = Annotated[
    Path | None, typer.Option(help="File with the client's secret; left out: a public client, protected by PKCE.")
]
ProviderScopes = Annotated[
    str, typer.Option(help="Scopes to ask the provider for; some need a further one for groups.")
]
NameClaim = Annotated[
    str, typer.Option(metavar="CLAIM", help="Claim that names a new user, such as email or preferred_username.")
]
GroupsClaim = Annotated[str, typer.Option(metavar="CLAIM", help="Claim that lists a person's groups.")]
GroupRoles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GROUP=ROLE", help="Role of a group, set at each sign-in; may be repeated, the highest holds."
    ),
]
DefaultRole = Annotated[
    Literal["viewer", "user", "none"],
    typer.Option(help="Role of those in no such group; none: they may not sign in."),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(metavar="DOMAIN", help="Domain of the verified e-mail addresses that may sign in; may be repeated."),
]


def oidc_settings(
    issuer: str | None,
    client_id: str | None,
    *,
    secret_file: Path | None,
    claims: tuple[str, str, str],
    roles: Sequence[str],
    access: tuple[str, Sequence[str]],
) -> OidcSettings | None:
    """Return the settings of the sign-in; None where no issuer is given. Raises RecipeError.

    ``claims``: scopes, claim of the name, claim of the groups; ``access``: default role and allowed domains.
    """
    if issuer is None:
        if client_id or secret_file or roles or access[1]:
            raise RecipeError("--oidc-issuer: is missing, and other --oidc options are given; name the provider")
        return None
    if not client_id:
        raise RecipeError("--oidc-client-id: is missing; give the id that the provider has for this service")
    from llmprune.service.oidc.provider import Provider
    from llmprune.service.oidc.settings import OidcSettings

    settings = OidcSettings(
        issuer=issuer,
        client_id=client_id,
        secret_file=secret_file.absolute() if secret_file else None,
        scopes=claims[0],
        name_claim=claims[1],
        groups_claim=claims[2],
        roles=tuple(_group_role(one) for one in roles),
        default_role=None if access[0] == "none" else access[0],
        domains=tuple(access[1]),
    )
    Provider(settings)  # says what is wrong, or missing on this machine, before the service starts
    return settings


def _group_role(text: str) -> tuple[str, Role]:
    from llmprune.service.users.users import ROLES

    group, separator, name = text.rpartition("=")
    for role in ROLES:
        if group and separator and role == name:
            return group, role
    raise RecipeError(f"--oidc-role {text!r}: give GROUP=ROLE, with a role of {', '.join(ROLES)}")
