"""The service's commands: one to serve, the others to call a service that runs. Bodies import late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable

if TYPE_CHECKING:
    from llmprune.service.cli.client import Client

Server = Annotated[
    str, typer.Option("--server", envvar="LLMPRUNE_SERVER", metavar="URL", help="Where llmprune serve runs.")
]
TokenFile = Annotated[Path | None, typer.Option(help="File with the token; else the variable LLMPRUNE_TOKEN has it.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
HubTokenFile = Annotated[Path, typer.Option(help="File with a hub token for this push alone; not kept there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DataDir = Annotated[Path, typer.Option(help="Folder of the job table and of all jobs.")]
_HERE = "http://127.0.0.1:8321"


def serve(
    data_dir: DataDir = Path("runs/service"),
    host: Annotated[str, typer.Option(help="Address to bind; beyond this machine a token must exist.")] = "127.0.0.1",
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to bind.")] = 8321,
    host_name: Annotated[
        list[str] | None, typer.Option(help="Name by which browsers call it, as behind a proxy; may be repeated.")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address or network of a reverse proxy, whose X-Forwarded headers are believed; may be repeated.",
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Jobs without a GPU that run at a time.")] = 1,
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs to lend to jobs, such as 0,1; none: none. Default: all that the driver shows."),
    ] = None,
    allow_root: Annotated[
        list[Path] | None, typer.Option(help="Folder under which recipes may name models and text; may be repeated.")
    ] = None,
    allow_tasks: Annotated[
        list[Path] | None, typer.Option(help="Folder of lm-eval task files that recipes may name. They run code.")
    ] = None,
    torchrun_options: Annotated[
        str | None, typer.Option(help="Options of torchrun for jobs of that launcher, such as those for several nodes.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ray cluster for jobs of the launcher ray, such as http://head:8265."),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(min=0, help="Most seconds that a job runs; waiting does not count. 0: no limit.")
    ] = 86400.0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory of a job on this machine, or of each of its GPUs; above it the job is ended. 0: no "
            "limit. Default: 80% of the memory, shared by slots and GPUs.",
        ),
    ] = None,
    disk_quota: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Most disk of all jobs; above it the oldest models are deleted, reports stay."
        ),
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Days after which a job's model is deleted; its report stays.")
    ] = None,
    keep_jobs: Annotated[
        bool, typer.Option("--keep-jobs", help="When the service stops, leave its jobs running; it finds them again.")
    ] = False,
    max_queued: Annotated[int, typer.Option(min=1, help="Jobs that one user may have in the queue.")] = 1000,
    share_jobs: Annotated[
        bool, typer.Option("--share-jobs", help="Everybody with a token may read every job; else owners and admins.")
    ] = False,
    lend_hub_token: Annotated[
        bool,
        typer.Option("--lend-hub-token", help="Jobs and plans use your hub token and cache, private repositories too."),
    ] = False,
) -> None:
    """Serve pruning jobs over HTTP and in the browser."""
    import ipaddress
    import shlex

    from llmprune.common.schema import parse_size
    from llmprune.service.server import serve as serve_forever
    from llmprune.service.settings import Settings
    from llmprune.service.supervisor.devices import choose_gpus, find_gpus

    for folder in (*(allow_root or ()), *(allow_tasks or ())):
        if not folder.is_dir():
            raise RecipeError(
                f"{folder} is not a folder (looked in {Path.cwd()}); give --allow-root and --allow-tasks folders"
            )
    proxies = []
    for proxy in trusted_proxy or ():
        try:
            proxies.append(str(ipaddress.ip_network(proxy, strict=False)))  # uvicorn skips 10.1.2.3/8 without a word
        except ValueError:
            raise RecipeError(f"--trusted-proxy {proxy!r}: give an address or a network, such as 10.0.0.0/8") from None
    try:
        quota = parse_size(disk_quota) if disk_quota else None
        memory = {} if memory_limit is None else {"memory_limit": _limit(memory_limit)}
        options = tuple(shlex.split(torchrun_options or ""))
    except ValueError as error:
        raise RecipeError(f"arguments: {error}") from None
    if ray and not ray.startswith(("http://", "https://")):
        raise RecipeError(f"--ray {ray}: give the URL of its job API, such as http://head:8265")
    chosen = find_gpus() if gpus is None else choose_gpus(gpus)
    serve_forever(
        Settings(
            data_dir=data_dir.absolute(), host=host, port=port,
            host_names=tuple(host_name or ()), trusted_proxies=tuple(proxies), slots=slots, gpus=chosen,
            allow_roots=tuple(folder.resolve() for folder in allow_root or ()),
            allow_tasks=tuple(folder.resolve() for folder in allow_tasks or ()),
            torchrun_options=options, ray=ray, time_limit=time_limit or None, disk_quota=quota,
            keep_days=keep_days, keep_jobs=keep_jobs, max_queued=max_queued,
            share_jobs=share_jobs, lend_hub_token=lend_hub_token, **memory,
        )
    )  # fmt: skip


def token(
    action: Annotated[Literal["create", "list", "revoke"], typer.Argument(metavar="create|list|revoke")],
    name: Annotated[str | None, typer.Option(help="Whose token it is.")] = None,
    *,
    role: Annotated[
        Literal["user", "admin"], typer.Option(help="Users read and change their own jobs, admins every job.")
    ] = "user",
    data_dir: DataDir = Path("runs/service"),
) -> None:
    """Make, list or revoke the service's tokens. A new one is printed once; only its digest is kept."""
    import time

    from llmprune.service.logs import audit_command
    from llmprune.service.server import open_table
    from llmprune.service.settings import Settings

    tokens = open_table(Settings(data_dir=data_dir))
    if action == "list":
        for known, its_role, created in tokens.everyone():
            typer.echo(f"{printable(known)}  {its_role}  {time.strftime('%Y-%m-%d', time.localtime(created))}")
    elif name is None:
        raise RecipeError(f"token {action} needs --name")
    elif action == "create":
        made = tokens.create(name, role)
        typer.echo(made)
        audit_command(data_dir, action="token create", token=name, role=role)
    else:
        tokens.revoke(name)
        audit_command(data_dir, action="token revoke", token=name)


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe; may be repeated.")
    ] = None,
    *,
    name: Annotated[str | None, typer.Option(help="For people; default: from the recipe.")] = None,
    launcher: Annotated[str | None, typer.Option(help="local, torchrun or, where it is offered, ray.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Default: 1 where the service has one; on ray none.")] = None,
    priority: Annotated[int | None, typer.Option(help="Higher goes first; above 0: admins only.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds that it may run.")] = None,
    hub_token_file: Annotated[
        Path | None, typer.Option(help="File with a hub token for this job alone; deleted there when it ends.")
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Let everybody with a token read it.")] = False,
    follow: Annotated[bool, typer.Option("--watch", help="Watch it until it has ended.")] = False,
    server: Server = _HERE,
    token_file: TokenFile = None,
) -> None:
    """Send a recipe to a service; prints the job's id."""
    text = _read(recipe, "recipe")
    hub_token = _token(hub_token_file, "hub token") if hub_token_file else None
    wishes = {"name": name, "launcher": launcher, "gpus": gpus, "priority": priority, "time_limit": time_limit}
    from llmprune.service.cli.local_paths import paths_of_this_machine

    for said in paths_of_this_machine(text, overrides or (), server=server):
        typer.echo(f"llmprune: note: {printable(said)}", err=True)
    with _client(server, token_file) as client:
        job = client.submit(text, overrides or (), hub_token=hub_token, shared=shared, **wishes)
        typer.echo(printable(job["id"]))
        if follow:
            _watch(client, job["id"])


def jobs(
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    search: Annotated[str | None, typer.Option(help="Only jobs whose name or model has this.")] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most jobs.")] = 20,
    as_json: Json = False,
    server: Server = _HERE,
    token_file: TokenFile = None,
) -> None:
    """List a service's jobs, the newest first."""
    with _client(server, token_file) as client:
        found = client.jobs(state=state, search=search, limit=limit)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from llmprune.service.cli.terminal import print_jobs

    print_jobs(found["jobs"])


def watch(job: JobArgument, server: Server = _HERE, *, token_file: TokenFile = None) -> None:
    """Watch a job until it has ended; ends as the run does: 0, 1, 2, or 3 for a gate not met or undecided."""
    with _client(server, token_file) as client:
        _watch(client, job)


def cancel(job: JobArgument, server: Server = _HERE, *, token_file: TokenFile = None) -> None:
    """End a job; what is done is kept for a retry."""
    with _client(server, token_file) as client:
        typer.echo(printable(client.cancel(job)["state"]))


def retry(
    job: JobArgument,
    hub_token_file: Annotated[
        Path | None, typer.Option(help="File with a hub token for this job alone; a push needs one.")
    ] = None,
    *,
    server: Server = _HERE,
    token_file: TokenFile = None,
) -> None:
    """Queue a failed or cancelled job again; it continues after one of its last finished layers."""
    hub_token = _token(hub_token_file, "hub token") if hub_token_file else None
    with _client(server, token_file) as client:
        typer.echo(printable(client.retry(job, hub_token)["state"]))


def reevaluate_job(
    job: JobArgument,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples a task; default: as many as the gate needs to be decided.")
    ] = None,
    *,
    hub_token_file: Annotated[
        Path | None, typer.Option(help="File with a hub token for this job alone; deleted there when it ends.")
    ] = None,
    server: Server = _HERE,
    token_file: TokenFile = None,
) -> None:
    """Evaluate more samples of a finished job's model; watches it, and ends as llmprune reevaluate does."""
    hub_token = _token(hub_token_file, "hub token") if hub_token_file else None
    with _client(server, token_file) as client:
        client.reevaluate(job, limit, hub_token=hub_token)
        _watch(client, job)


def fetch(
    job: JobArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: runs/JOB.")] = None,
    *,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this file, such as report.html; may be repeated.")
    ] = None,
    server: Server = _HERE,
    token_file: TokenFile = None,
) -> None:
    """Download a job's model, report and all else that its run wrote."""
    with _client(server, token_file) as client:
        for path in client.fetch(job, output or Path("runs") / job, names=only or ()):
            typer.echo(printable(str(path)))


def push_job(
    job: JobArgument,
    repo_id: Annotated[str, typer.Option(help="Repository that gets the model, such as org/name.")],
    *,
    hub_token_file: HubTokenFile,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a new repository; default: private.")
    ] = True,
    branch: Annotated[str | None, typer.Option(help="Branch that gets the commit; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    when: Annotated[
        str | None, typer.Option(help="always: also where the gate was not met, and the card says so.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    server: Server = _HERE,
    token_file: TokenFile = None,
) -> None:
    """Push a finished job's model to the hub from the service; watches it, and ends as the push does."""
    settings = {"repo_id": repo_id, "private": private, "branch": branch, "create_pr": create_pr}
    settings |= {"when": when, "commit_message": commit_message}
    with _client(server, token_file) as client:
        push = client.push(job, _token(hub_token_file, "hub token"), **settings)
        published = _watch(client, push["id"]).get("published")
        files = f"{published['files']} files" if published else "the model"
        typer.echo(printable(f"pushed {files} to {repo_id}"))
        if published:
            typer.echo(printable(published["url"]))


def add_to(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    for verb in (serve, submit, jobs, watch, cancel, retry, reevaluate_job, fetch, push_job, token):
        app.command()(verb)


def _watch(client: Client, job: str) -> dict[str, Any]:
    from llmprune.service.cli.terminal import show_progress

    ended = show_progress(client.watch(job), lambda: client.job(job))
    if ended["state"] in ("gate_not_met", "gate_undecided"):
        raise typer.Exit(3)
    if ended["state"] != "succeeded":
        code = ended["exit_code"]
        raise typer.Exit(code if code in (1, 2) else 1)
    return ended


def _client(server: str, token_file: Path | None) -> Client:
    from llmprune.service.cli.client import Client

    return Client(server, _token(token_file, "token") if token_file else None)


def _limit(text: str) -> int | None:
    """A size; None for 0. Raises ValueError."""
    from llmprune.common.schema import parse_size

    return None if text.strip() == "0" else parse_size(text)


def _token(path: Path, what: str) -> str:
    token = _read(path, what).removeprefix("\ufeff").strip()
    if not token:
        raise RecipeError(f"the {what} {path} is empty; give a file with the token")
    return token


def _read(path: Path, what: str) -> str:
    from llmprune.common.text_files import utf8

    try:
        return utf8(path.read_bytes())
    except ValueError as error:
        raise RecipeError(f"the {what} {path} {error}") from error
    except OSError as error:
        raise RecipeError(f"the {what} {path} cannot be read: {error.strerror}; give a text file") from error
