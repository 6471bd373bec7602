"""Settings of the service, which the operator gives when it starts and which never change while it runs."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llmprune.service.memory import memory_per_job
from llmprune.service.notifications.settings import NotificationSettings
from llmprune.service.oidc.settings import OidcSettings

SITE = Path(__file__).parent / "web" / "site"  # the documentation: built by make docs, part of the wheel
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseModel):
    """Settings of one service; see the options of ``llmprune serve``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path
    database_url: str | None = None  # PostgreSQL database, without a password; None: a file in data_dir
    host: str = "127.0.0.1"
    port: int = 8321
    host_names: tuple[str, ...] = ()  # further names under which browsers may reach it
    trusted_proxies: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded headers are trusted
    slots: int = 1  # CPU jobs at a time
    gpus: tuple[str, ...] = ()  # values for CUDA_VISIBLE_DEVICES
    allow_roots: tuple[Path, ...] = ()
    allow_tasks: tuple[Path, ...] = ()
    torchrun_options: tuple[str, ...] = ()
    ray: str | None = None  # URL of a Ray cluster's job API
    ray_node_gpus: int | None = None  # GPUs of the largest node that the cluster can add; None: of the largest it has
    artifacts: str | None = None  # URL of the store of artefacts of jobs on other machines; None: a shared data folder
    time_limit: float | None = 24 * 3600.0  # seconds; maximum and default for each job; None: no limit
    # bytes for one job, or for each of its GPUs; None: no limit
    memory_limit: int | None = Field(default_factory=lambda data: memory_per_job(data["slots"] + len(data["gpus"])))
    log_limit: int = 256 * 10**6  # bytes of one job's log
    disk_quota: int | None = None  # bytes of all jobs together
    upload_limit: int = 500 * 10**9  # bytes of an uploaded run folder
    keep_days: float | None = None
    keep_jobs: bool = False  # jobs run on while the service restarts
    share_jobs: bool = False  # every user with a token may read every job
    lend_hub_token: bool = False  # jobs without a token use the token and the cache of the user who started the service
    max_queued: int = 1000  # of one owner, as are the limits that follow
    max_jobs: int = 20_000  # ended ones included
    max_running: int | None = None  # jobs at a time
    max_gpus: int | None = None  # at a time
    user_disk: int | None = None  # bytes of all jobs
    jobs_per_day: int | None = None
    oidc: OidcSettings | None = None  # sign-in at an OpenID provider
    rate: float = 20.0  # requests per second of one caller, after a burst
    burst: int = 200
    requests: int = 32  # at a time from one caller, and twice as many from one address
    streams: int = 32  # event streams of one caller at a time; twice as many from one address, 8 times as many in all
    body_limit: int = 128 * 1024  # bytes; enough for a recipe of RECIPE_LIMIT bytes, urlencoded, and its form
    grace: float = 15.0  # seconds between SIGTERM and SIGKILL
    notifications: NotificationSettings = NotificationSettings()
    documentation: Path = SITE  # folder of the built pages
    command: tuple[str, ...] = (sys.executable, "-m", "llmprune")

    @property
    def database(self) -> Path:
        """File of the job table, where it is not in PostgreSQL."""
        return self.data_dir / "service.sqlite3"

    @property
    def empty_dir(self) -> Path:
        """An empty working directory, in which no hub id can be the name of a folder."""
        return self.data_dir / "nowhere"

    @property
    def hub_home(self) -> Path:
        """HF_HOME of jobs without a token, for what anybody may pull from the hub."""
        return self.data_dir / "hub-home"

    @property
    def trash(self) -> Path:
        """Folder of models that the clean-up is deleting."""
        return self.data_dir / "trash"

    def folder(self, job: str) -> Path:
        """Return the folder of a job."""
        return self.data_dir / "jobs" / job

    def log(self, job: str) -> Path:
        """Return the log file of a job."""
        return self.folder(job) / "log.txt"

    def run_folder(self, job: str) -> Path:
        """Return the run folder of a job."""
        return self.folder(job) / "run"

    def prepare(self) -> None:
        """Make the folders, without access for other users of the machine."""
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.data_dir / "jobs").mkdir(exist_ok=True)
        self.empty_dir.mkdir(exist_ok=True)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    return host in LOOPBACK or host.startswith("127.")
