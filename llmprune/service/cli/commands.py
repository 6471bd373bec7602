"""The commands of the service: its start, and the calls to a running service. Bodies import late."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.service.cli import user_commands
from llmprune.service.cli.backup_commands import backup, restore
from llmprune.service.cli.serve import serve

if TYPE_CHECKING:
    from llmprune.service.client.sync.client import Client
    from llmprune.service.client.sync.job import JobHandle
    from llmprune.service.jobs.job import JobSummary

Server = Annotated[
    str, typer.Option("--server", envvar="LLMPRUNE_SERVER", metavar="URL", help="Address of the service.")
]
TokenFile = Annotated[Path | None, typer.Option(help="File with the token; default: the variable LLMPRUNE_TOKEN.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
HubTokenFile = Annotated[
    Path, typer.Option(help="File with a hub token for this push alone; the service deletes it afterwards.")
]
NotifyUrl = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="Webhook that the service calls when the job ends; may be repeated."),
]
NotifyEmail = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDRESS", help="Address that gets an e-mail when the job ends; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
LOCAL_SERVER = "http://127.0.0.1:8321"


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe; may be repeated.")
    ] = None,
    *,
    name: Annotated[str | None, typer.Option(help="Name of the job for people; default: made from the recipe.")] = None,
    launcher: Annotated[
        str | None, typer.Option(help="Launcher that the service offers, such as torchrun; default: local.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of GPUs. Default: 1 where the service's machine has one; 0 on another machine."
        ),
    ] = None,
    priority: Annotated[
        int | None, typer.Option(help="Jobs with a higher priority start first; above 0 for admins only.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Maximum run time in seconds.")] = None,
    hub_token_file: Annotated[
        Path | None,
        typer.Option(help="File with a hub token for this job alone; the service deletes it when the job ends."),
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Every user with a token may read it.")] = False,
    notify_url: NotifyUrl = None,
    notify_email: NotifyEmail = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the job until it has ended.")] = False,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Submit a recipe to a service; prints the job's id."""
    text = read_text(recipe, "recipe")
    hub_token = token_in(hub_token_file, "hub token") if hub_token_file else None
    settings: dict[str, Any] = {
        "name": name,
        "launcher": launcher,
        "gpus": gpus,
        "priority": priority,
        "time_limit": time_limit,
        "notify_urls": notify_url,
        "notify_emails": notify_email,
    }
    _note_local_paths(text, overrides or (), server=server)
    with client_of(server, token_file) as client:
        job = client.submit(recipe, overrides or (), hub_token=hub_token, shared=shared, **settings)
        typer.echo(printable(job.id))
        if follow:
            watch_job(job)


def _note_local_paths(recipe: str, overrides: Sequence[str], *, server: str) -> None:
    from llmprune.service.cli.local_paths import paths_of_this_machine

    for note in paths_of_this_machine(recipe, overrides, server=server):
        typer.echo(f"llmprune: note: {printable(note)}", err=True)


def jobs(
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    search: Annotated[str | None, typer.Option(help="Only jobs whose name or model contains this.")] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Maximum number of jobs.")] = 20,
    as_json: Json = False,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """List a service's jobs, the newest first."""
    with client_of(server, token_file) as client:
        found = client.page(state=state, search=search, limit=limit)
    if as_json:
        typer.echo(json.dumps(json.loads(found.model_dump_json()), indent=1))  # in ASCII, with infinity as text
        return
    from llmprune.service.cli.terminal import print_jobs

    print_jobs(job.model_dump() for job in found.jobs)


def watch(job: JobArgument, server: Server = LOCAL_SERVER, *, token_file: TokenFile = None) -> None:
    """Watch a job until it has ended; exits as the run does: 0, 1, 2, or 3 for a gate not met or undecided."""
    with client_of(server, token_file) as client:
        watch_job(client.job(job))


def cancel(job: JobArgument, server: Server = LOCAL_SERVER, *, token_file: TokenFile = None) -> None:
    """Cancel a job; the finished part is kept for a retry."""
    with client_of(server, token_file) as client:
        typer.echo(printable(client.job(job).cancel().state))


def retry(
    job: JobArgument,
    hub_token_file: Annotated[
        Path | None, typer.Option(help="File with a hub token for this job alone; a push needs one.")
    ] = None,
    *,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Queue a failed or cancelled job again; it continues after one of the last finished layers."""
    hub_token = token_in(hub_token_file, "hub token") if hub_token_file else None
    with client_of(server, token_file) as client:
        typer.echo(printable(client.job(job).retry(hub_token=hub_token).state))


def share(job: JobArgument, server: Server = LOCAL_SERVER, *, token_file: TokenFile = None) -> None:
    """Let every user of the service read a job."""
    with client_of(server, token_file) as client:
        client.job(job).share()


def unshare(job: JobArgument, server: Server = LOCAL_SERVER, *, token_file: TokenFile = None) -> None:
    """Let only its owner and admins read a job."""
    with client_of(server, token_file) as client:
        client.job(job).unshare()


def reevaluate_job(
    job: JobArgument,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples for each task; default: as many as the gate needs to be decided.")
    ] = None,
    *,
    hub_token_file: Annotated[
        Path | None,
        typer.Option(help="File with a hub token for this job alone; the service deletes it when the job ends."),
    ] = None,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Evaluate a finished job's model on more samples; watches the job and exits as llmprune reevaluate does."""
    hub_token = token_in(hub_token_file, "hub token") if hub_token_file else None
    with client_of(server, token_file) as client:
        found = client.job(job)
        found.reevaluate(limit, hub_token=hub_token)
        watch_job(found)


def fetch(
    job: JobArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: runs/JOB.")] = None,
    *,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this file, such as report.html; may be repeated.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Download one tar archive, such as model.tar, not a folder.")
    ] = None,
    model_only: Annotated[bool, typer.Option("--model-only", help="Only the files of the model.")] = False,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Download a job's model, report and all other files of its run. A download that broke continues.

    Each file of an ended job is compared with the service's SHA-256.
    """
    if archive is not None and (output is not None or only):
        raise RecipeError("--archive: an archive has all files, or the model alone; leave out --output and --only")
    with client_of(server, token_file) as client:
        found = client.job(job)
        if archive is not None:
            paths = [found.archive(archive, model_only=model_only)]
        else:
            paths = found.fetch(output or Path("runs") / job, names=only or (), model_only=model_only)
    for path in paths:
        typer.echo(printable(str(path)))


def push_job(
    job: JobArgument,
    repo_id: Annotated[str, typer.Option(help="Repository for the model, such as org/name.")],
    *,
    hub_token_file: HubTokenFile,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a new repository; default: private.")
    ] = True,
    branch: Annotated[str | None, typer.Option(help="Branch for the commit; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    when: Annotated[
        str | None, typer.Option(help="always: push also where the gate was not met, which the card reports.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    quantized_repo_id: Annotated[
        str | None,
        typer.Option(help="Repository for the quantized result, such as org/name-fp8; auto: named like that."),
    ] = None,
    server: Server = LOCAL_SERVER,
    token_file: TokenFile = None,
) -> None:
    """Push a finished job's model to the hub from the service; watches the push and exits as it does."""
    settings: dict[str, Any] = {"private": private, "branch": branch, "create_pr": create_pr, "when": when}
    settings |= {"commit_message": commit_message, "quantized_repo_id": quantized_repo_id}
    with client_of(server, token_file) as client:
        hub_token = token_in(hub_token_file, "hub token")
        push = client.job(job).push(hub_token, repo_id=repo_id, **settings)
        published = watch_job(push).published
        for one in filter(None, (published, published and published.quantized)):
            typer.echo(printable(f"pushed {one.files} files to {one.repo_id}"))
            typer.echo(printable(one.url))
        if published is None:
            typer.echo(printable(f"pushed the model to {repo_id}"))


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    calls = (submit, jobs, watch, cancel, retry, share, unshare, reevaluate_job, fetch, push_job)
    for command in (serve, *calls, backup, restore):
        app.command()(command)
    user_commands.add_to(app)


def watch_job(job: JobHandle) -> JobSummary:
    """Show a job's progress until it has ended and return it. Raises typer.Exit unless it has succeeded."""
    job.progress()
    ended = job.shown
    if ended.state in ("gate_not_met", "gate_undecided"):
        raise typer.Exit(3)
    if ended.state != "succeeded":
        raise typer.Exit(ended.exit_code if ended.exit_code in (1, 2) else 1)
    return ended


def client_of(server: str, token_file: Path | None) -> Client:
    """Return a client of a service, with the token of a file or of the variable LLMPRUNE_TOKEN."""
    from llmprune.service.client.sync.client import Client

    return Client(server, token_in(token_file, "token") if token_file else None)


def token_in(path: Path, what: str) -> str:
    """Return the token in a file. Raises RecipeError; ``what`` names the token in its message."""
    token = read_text(path, what).removeprefix("\ufeff").strip()
    if not token:
        raise RecipeError(f"the {what} {path} is empty; give a file with the token")
    return token


def read_text(path: Path, what: str) -> str:
    """Read a text file. Raises RecipeError."""
    from llmprune.common.text_files import utf8

    try:
        return utf8(path.read_bytes())
    except ValueError as error:
        raise RecipeError(f"the {what} {path} {error}") from error
    except OSError as error:
        raise RecipeError(f"the {what} {path} cannot be read: {error.strerror}; give a text file") from error
