"""The commands of the model library: ``models``, ``label``, ``sweep``, ``upload``. Bodies import late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.service.cli.commands import LOCAL_SERVER, Json, Server, TokenFile, client_of, token_in

_SEARCH = "Only models whose name, base, tags or notes have these words."
_SET = "Override a key of the recipe; several values, separated by commas, make a job each. May be repeated."


def models(
    search: Annotated[str | None, typer.Option(help=_SEARCH)] = None,
    stage: Annotated[str | None, typer.Option(help="Only models of this stage: candidate, approved, retired.")] = None,
    *,
    tag: Annotated[str | None, typer.Option(help="Only models with this tag.")] = None,
    base: Annotated[str | None, typer.Option(help="Only models pruned from this one.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only models of this user.")] = None,
    sort: Annotated[
        str,
        typer.Option(
            help="finished, name, base, parameters, bytes, size (share of the dense model's), retention, speed, stage "
            "or owner."
        ),
    ] = "finished",
    ascending: Annotated[bool, typer.Option("--ascending", help="The smallest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Maximum number of models.")] = 20,
    as_json: Json = False,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """List the models of a service's library."""
    filters: dict[str, Any] = {"search": search, "stage": stage, "tag": tag, "base": base, "owner": owner}
    filters |= {"sort": sort, "order": "asc" if ascending else "desc"}
    with client_of(server, token_file) as client:
        found = client.model_page(limit=limit, **filters)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    from llmprune.service.cli.terminal import print_models

    print_models(model.model_dump() for model in found.models)


def label(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids of the jobs that made the models.")],
    stage: Annotated[str | None, typer.Option(help="candidate, approved or retired.")] = None,
    *,
    tag: Annotated[list[str] | None, typer.Option(help="Tag to add; may be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="Tag to remove; may be repeated.")] = None,
    notes: Annotated[str | None, typer.Option(help="Notes, in place of earlier ones.")] = None,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Change stage, tags and notes of models in a service's library."""
    if stage is None and not tag and not untag and notes is None:
        raise RecipeError("nothing to change: give --stage, --tag, --untag or --notes")
    labels: dict[str, Any] = {"stage": stage, "add_tags": tag, "remove_tags": untag, "notes": notes}
    with client_of(server, token_file) as client:
        for model in client.label_models(jobs, **labels):
            typer.echo(printable(f"{model.id}: {model.stage} {' '.join(model.tags)}".rstrip()))


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="A.B=C,D", help=_SET)],
    *,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; default: from the model and the keys.")] = None,
    launcher: Annotated[str | None, typer.Option(help="Launcher of every job; default: local.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Number of GPUs of every job.")] = None,
    priority: Annotated[int | None, typer.Option(help="Priority of every job; above 0 for admins only.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Maximum run time of every job in seconds.")] = None,
    hub_token_file: Annotated[
        Path | None, typer.Option(help="File with a hub token for these jobs; each deletes it when it ends.")
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Every user with a token may read them.")] = False,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Submit a job for every combination of values; prints the jobs' ids and the page that compares them."""
    from llmprune.service.jobs.sweeps.axes import split_values

    vary = [one for one in overrides if len(split_values(one.partition("=")[2])) > 1]
    if not vary:
        raise RecipeError("no --set has several values; give one such as --set budget.parameters=0.9,0.8,0.7")
    settings: dict[str, Any] = {
        "name": name,
        "launcher": launcher,
        "gpus": gpus,
        "priority": priority,
        "time_limit": time_limit,
    }
    hub_token = token_in(hub_token_file, "hub token") if hub_token_file else None
    plain = [one for one in overrides if one not in vary]
    with client_of(server, token_file) as client:
        made = client.submit_sweep(recipe, plain, vary=vary, hub_token=hub_token, shared=shared, **settings)
    for one in made.jobs:
        typer.echo(printable(f"{one.job.id}  {one.job.name}"))
    typer.echo(f"{server.rstrip('/')}/sweeps/{made.id}")


def upload(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or an uncompressed tar archive of it.")
    ],
    name: Annotated[str | None, typer.Option(help="Name for people; default: that of the base.")] = None,
    *,
    tag: Annotated[list[str] | None, typer.Option(help="Tag of the model; may be repeated.")] = None,
    notes: Annotated[str | None, typer.Option(help="Notes on the model.")] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Every user with a token may read it.")] = False,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Put a finished run into a service's model library; prints the job's id. Run again, it continues."""
    from llmprune.service.cli.terminal import showing_bytes

    with client_of(server, token_file) as client, showing_bytes() as progress:
        job = client.upload(run_folder, name=name, tags=tag, notes=notes, shared=shared, progress=progress)
    typer.echo(printable(job.id))


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (models, label, sweep, upload):
        app.command()(command)
