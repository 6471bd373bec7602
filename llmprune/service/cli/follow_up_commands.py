"""The commands ``llmprune follow-up …``: work on a finished job of a service.

Each kind of work is a command whose options are the fields of its settings, so that the HTTP API and the command line
cannot differ. Bodies import late.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.service.cli.commands import (
    LOCAL_SERVER,
    JobArgument,
    Json,
    Server,
    TokenFile,
    client_of,
    token_in,
    watch_job,
)
from llmprune.service.jobs.follow_ups.work import KINDS

app = typer.Typer(
    help="Ask for work on a finished job of a service. It is a job of its own, and reuses what the finished one has.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_SETTINGS: dict[str, Any] = {
    "name": Annotated[str | None, typer.Option(help="Name of the new job for people.")],
    "launcher": Annotated[str | None, typer.Option(help="Launcher that the service offers; default: local.")],
    "gpus": Annotated[int | None, typer.Option(min=0, help="Number of GPUs; 0: the CPU.")],
    "time_limit": Annotated[float | None, typer.Option(help="Maximum run time in seconds.")],
    "shared": Annotated[bool, typer.Option("--shared", help="Every user with a token may read it.")],
}
_CALL: dict[str, Any] = {
    "hub_token_file": Annotated[
        Path | None, typer.Option(help="File with a hub token for the new job; the service deletes it afterwards.")
    ],
    "follow": Annotated[bool, typer.Option("--watch", help="Watch the new job until it has ended.")],
    "server": Server,
    "token_file": TokenFile,
}
_DEFAULTS: dict[str, Any] = {"shared": False, "follow": False, "server": LOCAL_SERVER}


@app.command("list")
def list_follow_ups(
    job: JobArgument, *, as_json: Json = False, server: Server = LOCAL_SERVER, token_file: TokenFile = None
) -> None:
    """Show which work a job can have, and which was asked for."""
    with client_of(server, token_file) as client:
        found = client.job(job).follow_ups()
    if as_json:
        typer.echo(json.dumps(json.loads(found.model_dump_json()), indent=1))  # in ASCII, with infinity as text
        return
    for offer in found.offers:
        typer.echo(printable(f"{offer.kind:<10} {offer.reason or 'possible'}"))
    if found.jobs:
        from llmprune.service.cli.terminal import print_jobs

        print_jobs(one.model_dump() for one in found.jobs)


def _command_of(kind: Any) -> Callable[..., None]:
    """Return the command of a kind of work, with an option for each of its settings."""
    name = kind.model_fields["kind"].default
    own = {field: _option(field, about) for field, about in kind.model_fields.items() if field != "kind"}

    def command(job: str, **given: Any) -> None:
        from llmprune.recipe.recipe import validate_arguments

        values = {field: _value(kind, field, given=given[field]) for field in own}
        work = validate_arguments(kind, {field: value for field, value in values.items() if value is not None})
        settings = {field: given[field] for field in _SETTINGS if given[field] is not None}
        token = token_in(given["hub_token_file"], "hub token") if given["hub_token_file"] else None
        with client_of(given["server"], given["token_file"]) as client:
            made = client.job(job).follow_up(work, hub_token=token, **settings)
            typer.echo(printable(made.id))
            if given["follow"]:
                watch_job(made)

    options = own | _SETTINGS | _CALL
    command.__name__, command.__doc__ = name, kind.__doc__
    command.__annotations__ = {"job": JobArgument, **options, "return": None}
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads it
        [
            inspect.Parameter("job", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=JobArgument),
            *(
                inspect.Parameter(name, keyword, default=_DEFAULTS.get(name), annotation=option)
                for name, option in options.items()
            ),
        ]
    )
    return command


def _option(name: str, about: Any) -> Any:
    """Return the annotation of the option of a setting; the service fills in the default of one that is not given."""
    default, annotation = about.default, about.annotation
    plain = next((one for one in (annotation, *get_args(annotation)) if one in (bool, int, float)), str)
    words = ",".join(map(str, default)) if isinstance(default, tuple) else default
    told = "" if words in (None, "", False) else f" Default: {words}."
    lists = " Separated by commas." if _is_list(annotation) else ""
    flags = [] if plain is not bool else ["--" + name.replace("_", "-")]
    return Annotated[plain | None, typer.Option(*flags, help=f"{about.description}{lists}{told}")]


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _value(kind: Any, field: str, *, given: Any) -> Any:
    """Return a setting as the API takes it: a list for texts that are separated by commas."""
    if given is None or not _is_list(kind.model_fields[field].annotation):
        return given
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not parts:
        raise RecipeError(f"--{field.replace('_', '-')} names nothing; give at least one value")
    return parts


for _kind in KINDS:
    app.command(_kind.model_fields["kind"].default)(_command_of(_kind))
