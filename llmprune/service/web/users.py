"""Pages of users, for admins: the list, and one user with role, quotas, tokens and jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Form, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, ConfigDict

from llmprune.common.errors import RecipeError
from llmprune.common.schema import format_size, parse_size
from llmprune.service.api.accounts.account import TokenId, require_user, revoke_of
from llmprune.service.api.accounts.users import UserName, details_of, known_user
from llmprune.service.api.dependencies import Service, TheCaller, TheService, audit_details
from llmprune.service.jobs.sharing import transfer
from llmprune.service.users.quotas import LABELS, OwnQuotas, QuotaName, audited, default_quotas, set_own_quotas
from llmprune.service.users.tokens import LOCAL, SCOPES, SCOPES_OF
from llmprune.service.users.users import SOURCE, Role
from llmprune.service.web.account import TokenForm, scope_choice, token_values, usage_rows
from llmprune.service.web.responses import page, page_router

router = page_router()

ROLE_MEANINGS: dict[Role, str] = {
    "viewer": "reads shared jobs",
    "user": "submits jobs and changes their own",
    "approver": "also approves models",
    "admin": "changes every job and manages users",
}
_EMPTY = {"name": "", "role": "user", "email": ""}
Short = Annotated[str, Form(max_length=250)]


class QuotaForm(BaseModel):
    """The form of a user's quotas: a number, none, or nothing for the service's."""

    model_config = ConfigDict(extra="ignore")

    running: str = ""
    queued: str = ""
    gpus: str = ""
    disk: str = ""
    per_day: str = ""
    kept: str = ""

    def quotas(self) -> OwnQuotas:
        """Return the quotas that the form describes. Raises RecipeError."""
        given = {name: text for name in LABELS if (text := getattr(self, name).strip())}
        return {name: _number(name, text) for name, text in given.items()}


@router.get("/users")
def users_page(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Show all users, and the form that makes one."""
    return _users(request, service, has_users=caller != LOCAL)


@router.post("/users")
def create_user(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    name: Short = "",
    role: Annotated[Role, Form()] = "user",
    email: Short = "",
) -> Response:
    """Make a user and show the user's page."""
    require_user(caller)
    audit_details(request, name=name.strip(), role=role, email=email.strip())
    try:
        made = service.users.create(name.strip(), role, email=email)
    except RecipeError as error:
        given = {"name": name, "role": role, "email": email}
        return _users(request, service, status=422, problem=error.problems[0], given=given)
    return RedirectResponse(f"/users/{made.name}", 303)


@router.get("/users/{user}")
def user_page(request: Request, user: UserName, *, service: TheService, caller: TheCaller) -> Response:
    """Show a user."""
    del caller
    return _user(request, service, user=user)


@router.post("/users/{user}")
def change_user(
    request: Request,
    user: UserName,
    *,
    service: TheService,
    role: Annotated[Role | None, Form()] = None,
    email: Short = "",
    access: Annotated[Literal["disable", "enable"] | None, Form()] = None,
) -> Response:
    """Change role and e-mail address, or access, of a user."""
    known_user(service, user)
    audit_details(request, role=role, email=None if role is None else email.strip(), access=access)
    try:
        if role is not None:
            service.users.set_role(user, role)
            service.users.set_email(user, email)
        if access is not None:
            (service.users.disable if access == "disable" else service.users.enable)(user)
            service.wake()
    except RecipeError as error:
        return _user(request, service, user=user, status=422, problem=error.problems[0])
    return RedirectResponse(f"/users/{user}", 303)


@router.post("/users/{user}/quotas")
def set_quotas(
    request: Request, user: UserName, *, service: TheService, form: Annotated[QuotaForm, Form()]
) -> Response:
    """Give a user quotas in place of the service's."""
    known_user(service, user)
    try:
        quotas = form.quotas()
        set_own_quotas(service.database, user, quotas=quotas)
    except RecipeError as error:
        return _user(request, service, user=user, status=422, problem=error.problems[0])
    audit_details(request, **audited(quotas))
    service.wake()
    return RedirectResponse(f"/users/{user}", 303)


@router.post("/users/{user}/transfer")
def transfer_jobs(request: Request, user: UserName, *, service: TheService, to: Short = "") -> Response:
    """Give all jobs of a user to another one."""
    try:
        moved = transfer(service.database, user, to=to.strip())
    except RecipeError as error:
        return _user(request, service, user=user, status=422, problem=error.problems[0])
    audit_details(request, to=to.strip(), jobs=moved)
    return RedirectResponse(f"/users/{user}", 303)


@router.post("/users/{user}/tokens")
def make_token(
    request: Request, user: UserName, *, service: TheService, form: Annotated[TokenForm, Form()]
) -> Response:
    """Make a token for a user and show it, this once."""
    known_user(service, user)
    try:
        wanted = form.wanted()
        audit_details(request, **wanted.model_dump())
        made = service.tokens.create(user, name=wanted.name, scopes=wanted.scopes, days=wanted.days)
    except RecipeError as error:
        return _user(request, service, user=user, status=422, problem=error.problems[0])
    return _user(request, service, user=user, made=made, made_name=wanted.name)


@router.post("/users/{user}/tokens/{token}/revoke")
def revoke_token(request: Request, user: UserName, *, token: TokenId, service: TheService) -> Response:
    """Revoke a token of a user."""
    audit_details(request, token=token)
    revoke_of(service, known_user(service, user).name, token=token)
    return RedirectResponse(f"/users/{user}", 303)


@router.post("/users/{user}/sign-out")
def sign_out_user(user: UserName, *, service: TheService) -> Response:
    """End all sessions of a user."""
    service.sessions.end_all(known_user(service, user).name)
    return RedirectResponse(f"/users/{user}", 303)


def _users(request: Request, service: Service, *, status: int = 200, **values: Any) -> Response:
    known = {"users": service.users.all(), "roles": ROLE_MEANINGS, "problem": None, "given": _EMPTY, "has_users": True}
    return page(request, "users", status=status, **known | values, at="users")


def _user(request: Request, service: Service, *, user: str, status: int = 200, **values: Any) -> Response:
    found = known_user(service, user)
    details = details_of(service, found)
    defaults = default_quotas(service.settings)
    known: dict[str, Any] = {
        "user": found,
        "usage": usage_rows(details.usage, details.quotas),
        "quotas": [
            (name, label, _shown(name, details.own_quotas[name]) if name in details.own_quotas else "",
             _shown(name, getattr(defaults, name)))
            for name, label in LABELS.items()
        ],
        "tokens": service.tokens.records(user),
        "sessions": service.sessions.of(user),
        "others": [one.name for one in service.users.all() if one.name != user and not one.disabled],
        "roles": ROLE_MEANINGS,
        "at": "users",
    }  # fmt: skip
    choice = scope_choice([scope for scope in SCOPES if scope in SCOPES_OF[found.role]])
    return page(request, "user", status=status, **known | token_values(f"/users/{user}", choice) | values)


def _shown(name: str, value: int | None) -> str:
    """Return a quota as the form takes it: exact, so that saving the form again changes nothing."""
    if value is None:
        return "none"
    size = format_size(value) if name == "disk" and value else ""
    return size if size and parse_size(size) == value else str(value)


def _number(name: QuotaName, text: str) -> int | None:
    """Return a quota of the form; None for no limit. Raises RecipeError."""
    if text.lower() == "none":
        return None
    try:
        value = parse_size(text) if name == "disk" and text != "0" else int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 2**53:
        example = "a size such as 200GB" if name == "disk" else "a number such as 4"
        raise RecipeError(f"{LABELS[name]}: {text!r} is no limit; give {example}, none, or nothing", SOURCE)
    return value
