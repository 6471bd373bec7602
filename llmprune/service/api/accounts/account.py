"""Routes of the caller's own account: usage and quotas, tokens, sessions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi import Path as InPath

from llmprune.common.errors import RecipeError
from llmprune.service.api.accounts.values import Account, MadeToken, NewToken, ShownSession, ShownToken
from llmprune.service.api.dependencies import Service, TheCaller, TheService, audit_details
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.users.quotas import default_quotas, quotas_of, usage_of
from llmprune.service.users.tokens import LOCAL, SCOPES, Caller

router = APIRouter(prefix="/v1/account", tags=["account"])

NO_USERS = (
    "the service has no users yet, and everybody on its machine is an admin; make the first one there: "
    "llmprune token create --name NAME --role admin"
)
TokenId = Annotated[str, InPath(max_length=64, description="The token's id or name.")]


@router.get("", responses=documented())
def show_account(service: TheService, caller: TheCaller) -> Account:
    """Return who the caller is, and how much of each quota is used."""
    return account_of(service, caller)


@router.get("/tokens", responses=documented())
def list_tokens(service: TheService, caller: TheCaller) -> list[ShownToken]:
    """List the caller's tokens; the tokens themselves are not stored."""
    return [ShownToken.model_validate(one, from_attributes=True) for one in service.tokens.records(caller.name)]


@router.post("/tokens", status_code=201, responses=documented(409, 413, 422, 507))
def make_token(wanted: NewToken, request: Request, *, service: TheService, caller: TheCaller) -> MadeToken:
    """Make a token for the caller. It never allows more than the token or session that makes it."""
    audit_details(request, **wanted.model_dump())
    return MadeToken(token=make_own_token(service, caller, wanted=wanted))


@router.delete("/tokens/{token}", status_code=204, responses=documented(404, 409, 422, 507))
def revoke_token(token: TokenId, request: Request, *, service: TheService, caller: TheCaller) -> None:
    """Revoke a token of the caller, with the sessions that it opened."""
    audit_details(request, token=token)
    require_user(caller)
    revoke_of(service, caller.name, token=token)


@router.get("/sessions", responses=documented())
def list_sessions(service: TheService, caller: TheCaller) -> list[ShownSession]:
    """List the caller's browser sessions, the newest first."""
    return [ShownSession.model_validate(one, from_attributes=True) for one in service.sessions.of(caller.name)]


@router.delete("/sessions", status_code=204, responses=documented(507))
def end_sessions(service: TheService, caller: TheCaller) -> None:
    """End all browser sessions of the caller."""
    service.sessions.end_all(caller.name)


def account_of(service: Service, caller: Caller) -> Account:
    """Return the account of a caller."""
    return Account(
        name=caller.name,
        role=caller.role,
        scopes=[scope for scope in SCOPES if caller.may(scope)],
        usage=usage_of(service.database, caller.name),
        quotas=quotas_of(service.database, caller.name, defaults=default_quotas(service.settings)),
    )


def make_own_token(service: Service, caller: Caller, *, wanted: NewToken) -> str:
    """Make a token for the caller, within the scopes of this request. Raises RecipeError and Refused (403, 409)."""
    require_user(caller)
    missing = [scope for scope in wanted.scopes if not caller.may(scope)] if wanted.scopes != [*SCOPES] else []
    if missing:
        raise Refused(403, f"you may not give the scopes {', '.join(missing)}, which you do not have here yourself")
    scopes = [scope for scope in wanted.scopes if scope in caller.scopes]
    return service.tokens.create(caller.name, name=wanted.name.strip(), scopes=scopes, days=wanted.days)


def revoke_of(service: Service, owner: str, *, token: str) -> None:
    """Revoke a user's token. Raises Refused (404) where there is none of this id or name."""
    try:
        service.tokens.revoke(owner, token)
    except RecipeError as error:
        raise Refused(404, error.problems[0]) from error


def require_user(caller: Caller) -> None:
    """Raise Refused (409) for the caller of a service without users."""
    if caller == LOCAL:
        raise Refused(409, NO_USERS)
