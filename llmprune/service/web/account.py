"""Page of the caller's own account: usage and quotas, tokens, sessions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Form, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, ConfigDict

from llmprune.common.errors import RecipeError
from llmprune.common.schema import format_size
from llmprune.service.api.access.auth import COOKIE
from llmprune.service.api.accounts.account import TokenId, account_of, make_own_token, require_user, revoke_of
from llmprune.service.api.accounts.values import NewToken
from llmprune.service.api.dependencies import Service, TheCaller, TheService, audit_details
from llmprune.service.users.quotas import LABELS, Quotas, Usage
from llmprune.service.users.tokens import LOCAL, SCOPE_MEANINGS, SCOPES, SCOPES_OF, Caller, Scope
from llmprune.service.web.responses import page, page_router

router = page_router()

AGES = {"30": "30 days", "90": "90 days", "365": "one year", "never": "never"}
On = Literal["on", ""]


class TokenForm(BaseModel):
    """The form that makes a token."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    expires: Literal["30", "90", "365", "never"] = "90"
    read: On = ""
    submit: On = ""
    manage: On = ""
    approve: On = ""
    account: On = ""
    admin: On = ""

    def wanted(self) -> NewToken:
        """Return the token that the form describes. Raises RecipeError."""
        scopes: list[Scope] = [scope for scope in SCOPES if getattr(self, scope)]
        name = self.name.strip()
        if not scopes or not name or len(name) > 64:
            raise RecipeError("give the token a name of at most 64 characters, and tick what it may do", "users")
        return NewToken(name=name, scopes=scopes, days=None if self.expires == "never" else float(self.expires))


@router.get("/account")
def account_page(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Show who the caller is, what is used of each quota, tokens and sessions."""
    return _account(request, service, caller=caller)


@router.post("/account/tokens")
def make_token(
    request: Request, service: TheService, *, caller: TheCaller, form: Annotated[TokenForm, Form()]
) -> Response:
    """Make a token and show it, this once."""
    try:
        wanted = form.wanted()
        audit_details(request, **wanted.model_dump())
        made = make_own_token(service, caller, wanted=wanted)
    except RecipeError as error:
        return _account(request, service, caller=caller, status=422, problem=error.problems[0])
    return _account(request, service, caller=caller, made=made, made_name=wanted.name)


@router.post("/account/tokens/{token}/revoke")
def revoke_token(request: Request, token: TokenId, *, service: TheService, caller: TheCaller) -> Response:
    """Revoke a token and return to the account."""
    audit_details(request, token=token)
    require_user(caller)
    revoke_of(service, caller.name, token=token)
    return RedirectResponse("/account", 303)


@router.post("/account/sessions/end")
def end_sessions(service: TheService, *, caller: TheCaller) -> Response:
    """End all sessions of the caller, this one too."""
    service.sessions.end_all(caller.name)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE)
    return response


def _account(request: Request, service: Service, *, caller: Caller, status: int = 200, **values: Any) -> Response:
    account = account_of(service, caller)
    known: dict[str, Any] = {
        "account": account,
        "usage": usage_rows(account.usage, account.quotas),
        "tokens": service.tokens.records(caller.name),
        "sessions": service.sessions.of(caller.name),
        "has_users": caller != LOCAL,
        "at": "account",
    }
    choice = scope_choice([scope for scope in SCOPES if caller.may(scope)])
    return page(request, "account", status=status, **known | token_values("/account", choice) | values)


def scope_choice(scopes: list[Scope]) -> list[tuple[Scope, str, bool]]:
    """Return scopes for a form, with their meaning, and whether each is ticked at first."""
    return [(scope, SCOPE_MEANINGS[scope], scope in SCOPES_OF["user"] - {"account"}) for scope in scopes]


def token_values(base: str, choice: list[tuple[Scope, str, bool]]) -> dict[str, Any]:
    """Return the values of the part of a page that lists and makes tokens."""
    return {"base": base, "scopes": choice, "ages": AGES, "made": None, "made_name": "", "problem": None}


def usage_rows(usage: Usage, quotas: Quotas) -> list[dict[str, Any]]:
    """Return label, usage, limit and used fraction of each quota, for people."""
    rows = []
    for name, label in LABELS.items():
        used, limit = getattr(usage, name), getattr(quotas, name)
        shown = format_size if name == "disk" else "{:,}".format
        rows.append(
            {
                "label": label,
                "used": shown(used),
                "limit": "no limit" if limit is None else shown(limit),
                "fraction": None if limit is None else min(1.0, used / limit) if limit else 1.0,
                "reached": limit is not None and used >= limit,
            }
        )
    return rows
