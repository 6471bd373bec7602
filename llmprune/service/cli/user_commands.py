"""The commands on the service's machine that manage its users and tokens. Bodies import late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, cast

import typer

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.service.cli.database_option import DatabaseUrl, database_url
from llmprune.service.cli.serve_options import DataDir

if TYPE_CHECKING:
    from llmprune.service.users.quotas import QuotaName
    from llmprune.service.users.tokens import Scope, Tokens
    from llmprune.service.users.users import Role, Users

RoleOption = Annotated[
    Literal["viewer", "user", "approver", "admin"] | None,
    typer.Option(help="What the user may do; default for a new user: user."),
]
Quota = Annotated[str | None, typer.Option(help="A number, none, or default for the service's limit.")]
T = TypeVar("T")
_Action = Literal["create", "list", "disable", "enable", "set-role", "set-email", "set-quota", "transfer", "delete"]


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
    from llmprune.service.users.tokens import SCOPES

    with _open_tokens(data_dir, database, make=action == "create") as tokens:
        if action == "list":
            _list_tokens(tokens, name)
            return
        if name is None:
            raise RecipeError(f"token {action} needs --name")
        if action == "revoke":
            tokens.revoke(name, label)
            audit_command(data_dir, action="token revoke", token=name, details={"token": label or "all"})
            return
        chosen = _scopes(scopes) if scopes else list(SCOPES)
        new_role = role or ("user" if tokens.owner_role(name) is None else None)
        typer.echo(tokens.create(name, new_role, name=label or "first", scopes=chosen, days=expires))
        audit_command(data_dir, action="token create", token=name, role=role, details={"token": label or "first"})


def _list_tokens(tokens: Tokens, name: str | None) -> None:
    """Print the tokens of a user, or of all."""
    for known in tokens.records(name):
        ends = f"expires {_day(known.expires)}" if known.expires else "never expires"
        words = (known.owner, known.role, known.name, ",".join(known.scopes), _day(known.created), ends)
        typer.echo(printable("  ".join(words)))


def user(
    action: Annotated[
        _Action, typer.Argument(metavar="create|list|disable|enable|set-role|set-email|set-quota|transfer|delete")
    ],
    user_name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the user.")] = None,
    *,
    name: Annotated[str | None, typer.Option(help="Name of the user, in place of the argument.")] = None,
    role: RoleOption = None,
    email: Annotated[
        str | None, typer.Option(help="Address; whoever proves it at the OpenID provider signs in as this user.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="User who gets all jobs, for transfer.")] = None,
    hand_over_to: Annotated[
        str | None, typer.Option(help="User who gets the jobs, models and sweeps, for delete; needed if there are any.")
    ] = None,
    running: Quota = None,
    queued: Quota = None,
    gpus: Quota = None,
    disk: Annotated[str | None, typer.Option(help="A size such as 200GB, none, or default.")] = None,
    per_day: Quota = None,
    kept: Quota = None,
    data_dir: DataDir = Path("runs/service"),
    database: DatabaseUrl = None,
) -> None:
    """Make, list, change and delete the service's users, their quotas, and who owns the jobs of one who leaves."""
    from llmprune.service.logs import audit_command
    from llmprune.service.users.users import Users

    quotas = {"running": running, "queued": queued, "gpus": gpus, "disk": disk, "per_day": per_day, "kept": kept}
    options = {"role": role, "email": email, "to": to, "hand_over_to": hand_over_to} | quotas
    _require_options(action, [option for option, value in options.items() if value is not None])
    if name is not None and user_name not in (None, name):
        raise RecipeError(f"two names, {user_name!r} and {name!r}; give one")
    with _open_tokens(data_dir, database, make=action == "create") as tokens:
        if action == "list":
            _list_users(Users(tokens.database))
            return
        chosen = _needed(user_name or name, action, option="a name, such as ann")
        if action == "set-quota":
            _set_quotas(tokens, chosen, given=quotas)
            details: dict[str, object] = {key: value for key, value in quotas.items() if value is not None}
        else:
            details = _changed(tokens, chosen, action=action, options=options, data_dir=data_dir)
        audit_command(data_dir, action=f"user {action}", user=chosen, details=details)


def _list_users(users: Users) -> None:
    """Print all users."""
    for one in users.all():
        words = (one.name, one.role, one.email or "-", "disabled" if one.disabled else "enabled", _day(one.created))
        typer.echo(printable("  ".join(words)))


_OPTIONS: dict[str, tuple[str, ...]] = {
    "create": ("role", "email"),
    "set-role": ("role",),
    "set-email": ("email",),
    "set-quota": ("running", "queued", "gpus", "disk", "per_day", "kept"),
    "transfer": ("to",),
    "delete": ("hand_over_to",),
}


def _require_options(action: _Action, given: list[str]) -> None:
    """Raise RecipeError for an option that the action does not have."""
    known = _OPTIONS.get(action, ())
    for one in given:
        if one not in known:
            shown = ", ".join(f"--{name.replace('_', '-')}" for name in known) or "none but the name"
            raise RecipeError(f"user {action} has no --{one.replace('_', '-')}; its options: {shown}")


def _changed(
    tokens: Tokens, name: str, *, action: _Action, options: Mapping[str, str | None], data_dir: Path
) -> dict[str, object]:
    """Change a user; return what the audit log says about it."""
    from llmprune.results.formatting import plural
    from llmprune.service.jobs.sharing import transfer
    from llmprune.service.jobs.uploads.uploads import Uploads
    from llmprune.service.settings import Settings
    from llmprune.service.users.deleted_users import delete_user, readmit
    from llmprune.service.users.users import Users

    users, shown = Users(tokens.database), printable(name)
    if action == "create":
        role = cast("Role", options["role"] or "user")
        users.create(name, role, email=options["email"])
        return {"role": role}
    if action == "set-role":
        users.set_role(name, cast("Role", _needed(options["role"], action, option="--role")))
        return {"role": options["role"]}
    if action == "set-email":
        users.set_email(name, _needed(options["email"], action, option="--email"))
        return {"email": options["email"]}
    if action == "transfer":
        to = _needed(options["to"], action, option="--to")
        moved = transfer(tokens.database, name, to=to)
        typer.echo(f"{moved} jobs of {shown} belong to {printable(to)} now")
        return {"to": to, "jobs": moved}
    if action == "delete":
        heir = options["hand_over_to"]
        moved = delete_user(tokens.database, name, hand_over_to=heir)
        Uploads(tokens.database, Settings(data_dir=data_dir)).remove_stale()
        typer.echo(f"{shown} is deleted" + (f"; {plural(moved, 'job')} now of {printable(heir)}" if heir else ""))
        return {"hand_over_to": heir, "jobs": moved}
    if action == "enable" and users.find(name) is None and readmit(tokens.database, name):
        typer.echo(f"{shown} was deleted; a sign-in at the provider may make a user of this name again")
        return {"deleted": True}
    (users.disable if action == "disable" else users.enable)(name)
    return {}


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (token, user):
        app.command()(command)


def _set_quotas(tokens: Tokens, name: str, *, given: dict[str, str | None]) -> None:
    """Change the quotas that are given; the others stay."""
    from llmprune.service.users.quotas import own_quotas, set_own_quotas

    if not any(given.values()):
        raise RecipeError("user set-quota needs a quota, such as --running 2 or --disk 200GB")
    quotas = own_quotas(tokens.database, name)
    for key, text in cast("dict[QuotaName, str | None]", given).items():
        if text == "default":
            quotas.pop(key, None)
        elif text is not None:
            quotas[key] = _quota(key, text)
    set_own_quotas(tokens.database, name, quotas=quotas)


def _quota(name: str, text: str) -> int | None:
    """Return a quota; None for no limit. Raises RecipeError."""
    from llmprune.common.schema import parse_size

    if text == "none":
        return None
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
    from llmprune.service.users.tokens import SCOPES

    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in SCOPES]
    if wrong:
        raise RecipeError(f"--scopes: there is no scope {wrong[0]!r}; choose from {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in names]


def _needed(value: T | None, action: str, *, option: str) -> T:
    if value is None:
        raise RecipeError(f"user {action} needs {option}")
    return value


@contextmanager
def _open_tokens(data_dir: Path, database: str | None, *, make: bool) -> Iterator[Tokens]:
    """Open the tokens of a service. ``make``: also where there is none yet. Raises OutputError, and for each write."""
    from llmprune.service.data_folder import usable
    from llmprune.service.server import open_tokens
    from llmprune.service.settings import Settings

    settings = Settings(data_dir=data_dir, database_url=database_url(database))
    with usable(settings):
        yield open_tokens(settings, make=make)


def _day(moment: float) -> str:
    import time

    return time.strftime("%Y-%m-%d", time.localtime(moment))
