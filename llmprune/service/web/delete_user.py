"""Page that asks before it deletes a user, for admins."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Form, Request
from fastapi.responses import RedirectResponse, Response

from llmprune.common.errors import RecipeError
from llmprune.service.api.accounts.users import UserName, delete, known_user
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.users.deleted_users import owned_by
from llmprune.service.users.tokens import Caller
from llmprune.service.web.responses import page, page_router

router = page_router()

Short = Annotated[str, Form(max_length=250)]


@router.get("/users/{user}/delete")
def ask(request: Request, user: UserName, *, service: TheService, caller: TheCaller) -> Response:
    """Ask whether to delete a user, and who gets the jobs."""
    return _ask(request, service, user=user, caller=caller)


@router.post("/users/{user}/delete")
def delete_user(
    request: Request, user: UserName, *, service: TheService, caller: TheCaller, hand_over_to: Short = ""
) -> Response:
    """Delete a user and return to the list."""
    try:
        delete(service, user, caller=caller, hand_over_to=hand_over_to.strip() or None, request=request)
    except RecipeError as error:
        return _ask(request, service, user=user, caller=caller, status=422, problem=error.problems[0])
    except Refused as error:
        if error.status_code == 404:
            raise
        return _ask(request, service, user=user, caller=caller, status=error.status_code, problem=error.detail)
    return RedirectResponse("/users", 303)


def _ask(
    request: Request, service: Service, *, user: str, caller: Caller, status: int = 200, problem: str | None = None
) -> Response:
    found = known_user(service, user)
    values: dict[str, Any] = {
        "user": found,
        "owned": str(owned_by(service.database, user)),
        "others": [one.name for one in service.users.all() if one.name != user and not one.disabled],
        "is_self": user == caller.name,
        "problem": problem,
    }
    return page(request, "delete_user", status=status, **values, at="users")
