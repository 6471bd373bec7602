"""The commands on the service's machine that manage its users and tokens. Bodies import late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.service.cli.database_option import DatabaseUrl, database_url
from llmprune.service.cli.serve import DataDir

if TYPE_CHECKING:
    from llmprune.service.jobs.quotas import OwnQuotas
    from llmprune.service.jobs.tokens import Scope, Tokens

RoleOption = Annotated[
    Literal["viewer", "user", "approver", "admin"] | None,
    typer.Option(help="What the user may do; default for a new user: user."),
]
Quota = Annotated[str | None, typer.Option(help="A number, none, or default for the service's limit.")]
T = TypeVar("T")
_Action = Literal["create", "list", "disable", "enable", "set-role", "set-email", "set-quota", "transfer"]


def token(
    action: Annotated[Literal["create", "list", "revoke"], typer.Argument(metavar="create|list|revoke")],
    name: Annotated[str | None, typer.Option(help="Whose token it is; create makes a new user.")] = None,
    *,
    role: RoleOption = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the token, where a user has several; revoke without it ends all.")
    ] = None,
    scopes: Annotated[
        str | None,
        typer.Option(help="What it may do, separated by commas: read, submit, manage, approve, account, admin."),
    ] = None,
    expires: Annotated[float | None, typer.Option(min=0, help="Days until it expires; default: never.")] = None,
    data_dir: DataDir = Path("runs/service"),
    database: DatabaseUrl = None,
) -> None:
    """Make, list or revoke the service's tokens. A new one is printed once; only its digest is stored."""
    from llmprune.service.logs import audit_command

    tokens = _tokens(data_dir, database)
    if action == "list":
        for known in tokens.records(name):
            ends = f"expires {_day(known.expires)}" if known.expires else "never expires"
            words = (known.owner, known.role, known.name, ",".join(known.scopes), _day(known.created), ends)
            typer.echo(printable("  ".join(words)))
        return
    if name is None:
        raise RecipeError(f"token {action} needs --name")
    if action == "revoke":
        tokens.revoke(name, label)
        audit_command(data_dir, action="token revoke", token=name, details={"token": label or "all"})
        return
    from llmprune.service.jobs.tokens import SCOPES

    chosen = _scopes(scopes) if scopes else list(SCOPES)
    new_role = role or ("user" if tokens.owner_role(name) is None else None)
    typer.echo(tokens.create(name, new_role, name=label or "first", scopes=chosen, days=expires))
    audit_command(data_dir, action="token create", token=name, role=role, details={"token": label or "first"})


def user(
    action: Annotated[
        _Action, typer.Argument(metavar="create|list|disable|enable|set-role|set-email|set-quota|transfer")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the user.")] = None,
    *,
    role: RoleOption = None,
    email: Annotated[
        str | None, typer.Option(help="Address; whoever proves it at the OpenID provider signs in as this user.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="User who gets all jobs, for transfer.")] = None,
    running: Quota = None,
    queued: Quota = None,
    gpus: Quota = None,
    disk: Annotated[str | None, typer.Option(help="A size such as 200GB, none, or default.")] = None,
    per_day: Quota = None,
    kept: Quota = None,
    data_dir: DataDir = Path("runs/service"),
    database: DatabaseUrl = None,
) -> None:
    """Make, list and change the service's users, their quotas, and who owns the jobs of one who leaves."""
    from llmprune.service.jobs.users import Users
    from llmprune.service.logs import audit_command

    tokens = _tokens(data_dir, database)
    users = Users(tokens.database)
    if action == "list":
        for one in users.all():
            words = (one.name, one.role, one.email or "-", "disabled" if one.disabled else "enabled", _day(one.created))
            typer.echo(printable("  ".join(words)))
        return
    if name is None:
        raise RecipeError(f"user {action} needs --name")
    given = {"running": running, "queued": queued, "gpus": gpus, "disk": disk, "per_day": per_day, "kept": kept}
    details: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if action == "create":
        users.create(name, role or "user", email=email)
        details = {"role": role or "user"}
    elif action in ("disable", "enable"):
        (users.disable if action == "disable" else users.enable)(name)
    elif action == "set-role":
        users.set_role(name, _needed(role, action, option="--role"))
        details = {"role": role}
    elif action == "set-email":
        users.set_email(name, _needed(email, action, option="--email"))
        details = {"email": email}
    elif action == "set-quota":
        _set_quotas(tokens, name, given=given)
    else:
        from llmprune.service.jobs.sharing import transfer

        moved = transfer(tokens.database, name, to=_needed(to, action, option="--to"))
        typer.echo(f"{moved} jobs of {printable(name)} belong to {printable(str(to))} now")
        details = {"to": to, "jobs": moved}
    audit_command(data_dir, action=f"user {action}", user=name, details=details)


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (token, user):
        app.command()(command)


def _set_quotas(tokens: Tokens, name: str, *, given: dict[str, str | None]) -> None:
    """Change the quotas that are given; the others stay."""
    from llmprune.service.jobs.quotas import own_quotas, set_own_quotas

    if not any(given.values()):
        raise RecipeError("user set-quota needs a quota, such as --running 2 or --disk 200GB")
    before: OwnQuotas = own_quotas(tokens.database, name)
    changes = {key: _quota(key, text) for key, text in given.items() if text is not None}
    set_own_quotas(tokens.database, name, quotas=before.model_copy(update=changes))


def _quota(name: str, text: str) -> int | None:
    """Return a quota: None for the service's, -1 for none. Raises RecipeError."""
    from llmprune.common.schema import parse_size

    if text == "default":
        return None
    if text == "none":
        return -1
    try:
        value = parse_size(text) if name == "disk" and text != "0" else int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 2**53:
        option = f"--{name.replace('_', '-')}"
        example = "a size such as 200GB" if name == "disk" else "a number such as 4"
        raise RecipeError(f"{option} {text!r}: give {example}, none, or default")
    return value


def _scopes(text: str) -> list[Scope]:
    """Split scopes. Raises RecipeError."""
    from llmprune.service.jobs.tokens import SCOPES

    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in SCOPES]
    if wrong:
        raise RecipeError(f"--scopes: there is no scope {wrong[0]!r}; choose from {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in names]


def _needed(value: T | None, action: str, *, option: str) -> T:
    if value is None:
        raise RecipeError(f"user {action} needs {option}")
    return value


def _tokens(data_dir: Path, database: str | None) -> Tokens:
    from llmprune.service.server import open_tokens
    from llmprune.service.settings import Settings

    return open_tokens(Settings(data_dir=data_dir, database_url=database_url(database)))


def _day(moment: float) -> str:
    import time

    return time.strftime("%Y-%m-%d", time.localtime(moment))
