"""Options of ``llmprune serve``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from llmprune.service.cli import oidc_options as oidc
from llmprune.service.cli.database_option import DatabaseUrl
from llmprune.service.cli.notification_options import (
    MailDomain,
    MailFrom,
    PublicUrl,
    Smtp,
    SmtpPasswordFile,
    WebhookHost,
    Webhooks,
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


@dataclass(frozen=True)
class ServeOptions:
    """Options as they were given, in the order of the help."""

    data_dir: DataDir = Path("runs/service")
    host: Host = "127.0.0.1"
    database: DatabaseUrl = None
    port: Port = 8321
    host_name: HostName = None
    trusted_proxy: TrustedProxy = None
    slots: Slots = 1
    gpus: Gpus = None
    allow_root: AllowRoot = None
    allow_tasks: AllowTasks = None
    torchrun_options: TorchrunOptions = None
    ray: RayUrl = None
    ray_node_gpus: RayNodeGpus = None
    artifacts: Artifacts = None
    time_limit: TimeLimit = 86400.0
    memory_limit: MemoryLimit = None
    disk_quota: DiskQuota = None
    upload_limit: UploadLimit = "500GB"
    keep_days: KeepDays = None
    keep_jobs: KeepJobs = False
    max_queued: MaxQueued = 1000
    max_running: MaxRunning = None
    max_gpus: MaxGpus = None
    user_disk: UserDisk = None
    jobs_per_day: JobsPerDay = None
    max_jobs: MaxJobs = 20_000
    oidc_issuer: oidc.Issuer = None
    oidc_client_id: oidc.ClientId = None
    oidc_client_secret_file: oidc.SecretFile = None
    oidc_scopes: oidc.ProviderScopes = "openid profile email"
    oidc_name_claim: oidc.NameClaim = "preferred_username"
    oidc_groups_claim: oidc.GroupsClaim = "groups"
    oidc_role: oidc.GroupRoles = None
    oidc_default_role: oidc.DefaultRole = "user"
    oidc_domain: oidc.Domains = None
    share_jobs: ShareJobs = False
    lend_hub_token: LendHubToken = False
    first_token_file: FirstToken = None
    webhooks: Webhooks = "public"
    webhook_host: WebhookHost = None
    smtp: Smtp = None
    smtp_password_file: SmtpPasswordFile = None
    mail_from: MailFrom = None
    mail_domain: MailDomain = None
    public_url: PublicUrl = None

    @classmethod
    def signature(cls) -> inspect.Signature:
        """Return the signature of a command with these options."""
        hints, keyword = get_type_hints(cls, include_extras=True), inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature(
            [
                inspect.Parameter(one.name, keyword, default=one.default, annotation=hints[one.name])
                for one in fields(cls)
            ]
        )
