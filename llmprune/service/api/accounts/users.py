"""Routes of users, for admins."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath

from llmprune.service.api.accounts.account import TokenId, require_user, revoke_of
from llmprune.service.api.accounts.values import (
    MadeToken,
    Moved,
    NewToken,
    NewUser,
    Receiver,
    ShownToken,
    ShownUser,
    UserChanges,
    UserDetails,
)
from llmprune.service.api.dependencies import Service, TheCaller, TheService, audit_details
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.jobs.sharing import transfer
from llmprune.service.jobs.uploads.uploads import Uploads
from llmprune.service.users.deleted_users import delete_user as delete_user_of
from llmprune.service.users.quotas import (
    OwnQuotas,
    audited,
    default_quotas,
    own_quotas,
    quotas_of,
    set_own_quotas,
    usage_of,
)
from llmprune.service.users.tokens import LOCAL, Caller
from llmprune.service.users.users import NAME, User

router = APIRouter(prefix="/v1/users", tags=["users"])

NewOwner = Annotated[
    str | None,
    Query(pattern=f"^{NAME}$", description="User who gets the jobs, models and sweeps; needed where there are any."),
]
UserName = Annotated[str, InPath(pattern=f"^{NAME}$", description="The user's name.")]


@router.get("", responses=documented())
def list_users(service: TheService) -> list[ShownUser]:
    """List all users."""
    return [ShownUser.model_validate(user, from_attributes=True) for user in service.users.all()]


@router.post("", status_code=201, responses=documented(409, 413, 422, 507))
def create_user(wanted: NewUser, request: Request, *, service: TheService, caller: TheCaller) -> ShownUser:
    """Make a user, who signs in at the OpenID provider or with a token that an admin makes."""
    audit_details(request, **wanted.model_dump())
    require_user(caller)
    user = service.users.create(wanted.name, wanted.role, email=wanted.email)
    return ShownUser.model_validate(user, from_attributes=True)


@router.get("/{user}", responses=documented(404, 422))
def show_user(user: UserName, service: TheService) -> UserDetails:
    """Show a user with usage and quotas."""
    return details_of(service, known_user(service, user))


@router.patch("/{user}", responses=documented(404, 413, 422, 507))
def change_user(user: UserName, changes: UserChanges, *, request: Request, service: TheService) -> UserDetails:
    """Change role or e-mail address, or disable or enable a user. The last admin stays one."""
    audit_details(request, **changes.model_dump())
    known_user(service, user)
    if changes.role is not None:
        service.users.set_role(user, changes.role)
    if changes.email is not None:
        service.users.set_email(user, changes.email)
    if changes.disabled is not None:
        (service.users.disable if changes.disabled else service.users.enable)(user)
        service.wake()
    return details_of(service, known_user(service, user))


@router.put("/{user}/quotas", responses=documented(404, 413, 422, 507))
def set_quotas(user: UserName, quotas: OwnQuotas, *, request: Request, service: TheService) -> UserDetails:
    """Give a user quotas in place of the service's and of earlier ones; null: no limit."""
    audit_details(request, **audited(quotas))
    found = known_user(service, user)
    set_own_quotas(service.database, user, quotas=quotas)
    service.wake()
    return details_of(service, found)


@router.post("/{user}/transfer", responses=documented(404, 413, 422, 507))
def transfer_jobs(user: UserName, receiver: Receiver, *, request: Request, service: TheService) -> Moved:
    """Give all jobs of a user to another user, as when somebody leaves.

    Jobs from before there were users belong to ``local``.
    """
    audit_details(request, to=receiver.to)
    if user != LOCAL.name:
        known_user(service, user)
    return Moved(jobs=transfer(service.database, user, to=receiver.to))


@router.delete("/{user}", responses=documented(404, 409, 422, 507))
def delete_user(
    user: UserName, *, request: Request, service: TheService, caller: TheCaller, hand_over_to: NewOwner = None
) -> Moved:
    """Delete a user: tokens, sessions and the draft end at once. Jobs are never deleted, and running ones continue.

    Nobody deletes the own account, and the last admin stays.
    """
    return Moved(jobs=delete(service, user, caller=caller, hand_over_to=hand_over_to, request=request))


@router.delete("/{user}/sessions", status_code=204, responses=documented(404, 422, 507))
def end_user_sessions(user: UserName, service: TheService) -> None:
    """End all browser sessions of a user."""
    service.sessions.end_all(known_user(service, user).name)


@router.get("/{user}/tokens", responses=documented(404, 422))
def list_user_tokens(user: UserName, service: TheService) -> list[ShownToken]:
    """List the tokens of a user; the tokens themselves are not stored."""
    found = service.tokens.records(known_user(service, user).name)
    return [ShownToken.model_validate(one, from_attributes=True) for one in found]


@router.post("/{user}/tokens", status_code=201, responses=documented(404, 413, 422, 507))
def make_user_token(user: UserName, wanted: NewToken, *, request: Request, service: TheService) -> MadeToken:
    """Make a token for a user. It allows what its scopes and the user's role allow."""
    audit_details(request, **wanted.model_dump())
    name = known_user(service, user).name
    return MadeToken(token=service.tokens.create(name, name=wanted.name, scopes=wanted.scopes, days=wanted.days))


@router.delete("/{user}/tokens/{token}", status_code=204, responses=documented(404, 422, 507))
def revoke_user_token(user: UserName, token: TokenId, *, request: Request, service: TheService) -> None:
    """Revoke a token of a user, with the sessions that it opened."""
    audit_details(request, token=token)
    revoke_of(service, known_user(service, user).name, token=token)


def known_user(service: Service, name: str) -> User:
    """Return a user. Raises Refused (404)."""
    found = service.users.find(name)
    if found is None:
        raise Refused(404, f"there is no user {name!r}")
    return found


def delete(service: Service, user: str, *, caller: Caller, hand_over_to: str | None, request: Request) -> int:
    """Delete a user and return the number of jobs that were handed over. Raises Refused (404, 409) and RecipeError."""
    audit_details(request, hand_over_to=hand_over_to)
    if known_user(service, user).name == caller.name:
        raise Refused(
            409,
            "this is your own account, and deleting it would lock you out at once; ask another admin, or run "
            f"llmprune user delete {user} on the service's machine",
        )
    moved = delete_user_of(service.database, user, hand_over_to=hand_over_to)
    audit_details(request, hand_over_to=hand_over_to, jobs=moved)
    Uploads(service.database, service.settings).remove_stale()
    service.wake()
    return moved


def details_of(service: Service, user: User) -> UserDetails:
    """Return a user with usage and quotas."""
    return UserDetails(
        **ShownUser.model_validate(user, from_attributes=True).model_dump(),
        usage=usage_of(service.database, user.name),
        quotas=quotas_of(service.database, user.name, defaults=default_quotas(service.settings)),
        own_quotas=own_quotas(service.database, user.name),
    )
