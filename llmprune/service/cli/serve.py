"""The command that starts a service. Its body imports late."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from llmprune.common.errors import RecipeError
from llmprune.service.cli import oidc_options as oidc
from llmprune.service.cli.database_option import DatabaseUrl, database_url
from llmprune.service.cli.notification_options import (
    MailDomain,
    MailFrom,
    PublicUrl,
    Smtp,
    SmtpPasswordFile,
    WebhookHost,
    Webhooks,
    notification_settings,
)

DataDir = Annotated[Path, typer.Option(help="Folder of the job table and of all jobs.")]
Host = Annotated[str, typer.Option(help="Address to bind; one that other machines can reach needs a token first.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to bind.")]
HostName = Annotated[
    list[str] | None,
    typer.Option(help="Further name under which browsers reach it, as behind a proxy; may be repeated."),
]
TrustedProxy = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS",
        help="Address or network of a reverse proxy whose X-Forwarded headers are trusted; may be repeated.",
    ),
]
Slots = Annotated[int, typer.Option(min=1, max=1024, help="Jobs without a GPU that may run at a time.")]
Gpus = Annotated[
    str | None,
    typer.Option(help="GPUs for jobs, such as 0,1, or none. Default: every GPU that the driver lists."),
]
AllowRoot = Annotated[
    list[Path] | None, typer.Option(help="Folder under which recipes may name models and text; may be repeated.")
]
AllowTasks = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of lm-eval task files that recipes may name; task files run code. May be repeated."),
]
TorchrunOptions = Annotated[
    str | None,
    typer.Option(help="Options of torchrun for jobs of the launcher torchrun, such as those for several nodes."),
]
RayUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Ray cluster for jobs of the launcher ray, such as http://head:8265."),
]
RayNodeGpus = Annotated[
    int | None,
    typer.Option(
        min=0, help="GPUs of the largest node that the Ray cluster can add. Default: of the largest node that it has."
    ),
]
Artifacts = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Store for snapshots and results of jobs on a Ray cluster whose nodes do not share the data folder, such "
        "as s3://bucket/prefix, or file:///folder.",
    ),
]
TimeLimit = Annotated[
    float, typer.Option(min=0, help="Maximum run time of a job in seconds; waiting does not count. 0: no limit.")
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Maximum memory of a job on this machine, or of each of its GPUs; a job above it is ended. 0: no limit. "
        "Default: 80% of the memory, shared by slots and GPUs.",
    ),
]
DiskQuota = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Maximum disk space of all jobs; above it the oldest models are deleted and reports are kept.",
    ),
]
UploadLimit = Annotated[
    str, typer.Option(metavar="SIZE", help="Maximum size of an uploaded run folder. 0: no uploads.")
]
KeepDays = Annotated[
    float | None, typer.Option(min=0, help="Days after which a job's model is deleted; its report is kept.")
]
KeepJobs = Annotated[
    bool, typer.Option("--keep-jobs", help="Leave jobs running when the service stops; the next service finds them.")
]
MaxQueued = Annotated[int, typer.Option(min=1, help="Maximum number of jobs of one user in the queue.")]
ShareJobs = Annotated[
    bool,
    typer.Option("--share-jobs", help="Every user with a token may read every job; default: its owner and admins."),
]
MaxRunning = Annotated[int | None, typer.Option(min=0, help="Maximum number of running jobs of one user at a time.")]
MaxGpus = Annotated[int | None, typer.Option(min=0, help="Maximum number of GPUs of one user at a time.")]
JobsPerDay = Annotated[int | None, typer.Option(min=0, help="Maximum number of submissions of one user a day (UTC).")]
UserDisk = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Maximum disk space of one user's jobs; above it none starts.")
]
MaxJobs = Annotated[int, typer.Option(min=1, help="Maximum number of jobs of one user, ended ones included.")]
LendHubToken = Annotated[
    bool,
    typer.Option("--lend-hub-token", help="Jobs and plans use your hub token and cache, private repositories too."),
]
FirstToken = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Where there is no token yet, make one of the admin 'first' and write it into this file."
    ),
]


def serve(
    data_dir: DataDir = Path("runs/service"),
    host: Host = "127.0.0.1",
    *,
    database: DatabaseUrl = None,
    port: Port = 8321,
    host_name: HostName = None,
    trusted_proxy: TrustedProxy = None,
    slots: Slots = 1,
    gpus: Gpus = None,
    allow_root: AllowRoot = None,
    allow_tasks: AllowTasks = None,
    torchrun_options: TorchrunOptions = None,
    ray: RayUrl = None,
    ray_node_gpus: RayNodeGpus = None,
    artifacts: Artifacts = None,
    time_limit: TimeLimit = 86400.0,
    memory_limit: MemoryLimit = None,
    disk_quota: DiskQuota = None,
    upload_limit: UploadLimit = "500GB",
    keep_days: KeepDays = None,
    keep_jobs: KeepJobs = False,
    max_queued: MaxQueued = 1000,
    max_running: MaxRunning = None,
    max_gpus: MaxGpus = None,
    user_disk: UserDisk = None,
    jobs_per_day: JobsPerDay = None,
    max_jobs: MaxJobs = 20_000,
    oidc_issuer: oidc.Issuer = None,
    oidc_client_id: oidc.ClientId = None,
    oidc_client_secret_file: oidc.SecretFile = None,
    oidc_scopes: oidc.ProviderScopes = "openid profile email",
    oidc_name_claim: oidc.NameClaim = "preferred_username",
    oidc_groups_claim: oidc.GroupsClaim = "groups",
    oidc_role: oidc.GroupRoles = None,
    oidc_default_role: oidc.DefaultRole = "user",
    oidc_domain: oidc.Domains = None,
    share_jobs: ShareJobs = False,
    lend_hub_token: LendHubToken = False,
    first_token_file: FirstToken = None,
    webhooks: Webhooks = "public",
    webhook_host: WebhookHost = None,
    smtp: Smtp = None,
    smtp_password_file: SmtpPasswordFile = None,
    mail_from: MailFrom = None,
    mail_domain: MailDomain = None,
    public_url: PublicUrl = None,
) -> None:
    """Serve pruning jobs over HTTP and in the browser."""
    from llmprune.service import server
    from llmprune.service.settings import Settings
    from llmprune.service.supervisor import devices

    roots, tasks = _folders(allow_root), _folders(allow_tasks)
    proxies = tuple(_network(proxy) for proxy in trusted_proxy or ())
    if ray and not ray.startswith(("http://", "https://")):
        raise RecipeError(f"--ray {ray}: give the URL of its job API, such as http://head:8265")
    sign_in = oidc.oidc_settings(
        oidc_issuer, oidc_client_id, secret_file=oidc_client_secret_file, roles=oidc_role or (),
        claims=(oidc_scopes, oidc_name_claim, oidc_groups_claim), access=(oidc_default_role, oidc_domain or ()),
    )  # fmt: skip
    notifications = notification_settings(
        webhooks=webhooks, webhook_hosts=webhook_host, smtp=smtp, smtp_password_file=smtp_password_file,
        mail_from=mail_from, mail_domains=mail_domain, public_url=public_url,
    )  # fmt: skip
    settings = Settings(
        data_dir=data_dir.absolute(), database_url=database_url(database), host=host, port=port,
        host_names=tuple(host_name or ()), trusted_proxies=proxies,
        slots=slots, gpus=devices.find_gpus() if gpus is None else devices.choose_gpus(gpus), allow_roots=roots,
        allow_tasks=tasks, torchrun_options=_words(torchrun_options or ""), ray=ray, ray_node_gpus=ray_node_gpus,
        artifacts=_store(artifacts) if artifacts else None, time_limit=time_limit or None,
        disk_quota=_size(disk_quota) if disk_quota else None, keep_days=keep_days, keep_jobs=keep_jobs,
        max_queued=max_queued, max_running=max_running, max_gpus=max_gpus, max_jobs=max_jobs,
        jobs_per_day=jobs_per_day, user_disk=_size(user_disk) if user_disk else None, oidc=sign_in,
        upload_limit=_size(upload_limit) or 0, share_jobs=share_jobs, lend_hub_token=lend_hub_token,
        notifications=notifications,
        **({} if memory_limit is None else {"memory_limit": _size(memory_limit)}),
    )  # fmt: skip
    if first_token_file is not None:
        server.write_first_token(settings, first_token_file)
    server.serve(settings)


def _folders(folders: Iterable[Path] | None) -> tuple[Path, ...]:
    """Resolve folders. Raises RecipeError where one does not exist."""
    found = tuple(folders or ())
    for folder in found:
        if not folder.is_dir():
            raise RecipeError(
                f"{folder} is not a folder (looked in {Path.cwd()}); give --allow-root and --allow-tasks folders"
            )
    return tuple(folder.resolve() for folder in found)


def _store(url: str) -> str:
    """Return the URL of a store that can be written and read. Raises RecipeError and StoreUnreachable."""
    from llmprune.service.artifacts.store import ArtifactStore, require_url

    ArtifactStore(require_url(url)).check()
    return require_url(url)


def _network(proxy: str) -> str:
    """Return a network in the form that uvicorn needs, which ignores 10.1.2.3/8. Raises RecipeError."""
    import ipaddress

    try:
        return str(ipaddress.ip_network(proxy, strict=False))
    except ValueError:
        raise RecipeError(f"--trusted-proxy {proxy!r}: give an address or a network, such as 10.0.0.0/8") from None


def _words(options: str) -> tuple[str, ...]:
    """Split options as a shell does. Raises RecipeError."""
    import shlex

    try:
        return tuple(shlex.split(options))
    except ValueError as error:
        raise RecipeError(f"arguments: {error}") from None


def _size(text: str) -> int | None:
    """Return a size in bytes; None for 0, which means no limit. Raises RecipeError."""
    from llmprune.common.schema import parse_size

    try:
        return None if text.strip() == "0" else parse_size(text)
    except ValueError as error:
        raise RecipeError(f"arguments: {error}") from None
