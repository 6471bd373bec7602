"""What an operator decides when the service starts; frozen from then on."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llmprune.service.memory import share_of_a_job

SITE = Path(__file__).parent / "web" / "site"  # the documentation: built by make docs, part of the wheel
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseModel):
    """The service's settings; the options of ``llmprune serve`` say what each means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8321
    host_names: tuple[str, ...] = ()  # names by which browsers may call it
    trusted_proxies: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded headers are believed
    slots: int = 1  # CPU jobs at a time
    gpus: tuple[str, ...] = ()  # what CUDA_VISIBLE_DEVICES may name
    allow_roots: tuple[Path, ...] = ()
    allow_tasks: tuple[Path, ...] = ()
    torchrun_options: tuple[str, ...] = ()
    ray: str | None = None  # where a Ray cluster's job API is
    time_limit: float | None = 24 * 3600.0  # seconds; most and default of every job; None: no limit
    # bytes of one job, or of each of its GPUs; None: no limit
    memory_limit: int | None = Field(default_factory=lambda data: share_of_a_job(data["slots"] + len(data["gpus"])))
    log_limit: int = 256 * 10**6  # bytes of one job's log
    disk_quota: int | None = None  # bytes of all jobs together
    keep_days: float | None = None
    keep_jobs: bool = False  # jobs go on while the service restarts
    share_jobs: bool = False  # everybody with a token may read every job
    lend_hub_token: bool = False  # jobs without a token use that of whoever started the service, and that user's cache
    max_queued: int = 1000  # of one owner
    max_jobs: int = 20_000  # of one owner, ended ones included
    rate: float = 20.0  # requests a second of one caller, after a burst
    burst: int = 200
    requests: int = 32  # of one caller at a time, and twice as many of one address
    streams: int = 32  # of events, of one caller at a time; twice as many of one address, 8 times as many of all
    body_limit: int = 128 * 1024  # a recipe of RECIPE_LIMIT bytes, urlencoded, and its form
    grace: float = 15.0  # seconds between SIGTERM and SIGKILL
    documentation: Path = SITE  # folder of the built pages
    command: tuple[str, ...] = (sys.executable, "-m", "llmprune")

    @property
    def database(self) -> Path:
        """The file of the job table."""
        return self.data_dir / "service.sqlite3"

    @property
    def nowhere(self) -> Path:
        """An empty folder to work in, so that no hub id is ever taken for a folder that lies here."""
        return self.data_dir / "nowhere"

    @property
    def hub_home(self) -> Path:
        """The HF_HOME of jobs without a token: what anybody may pull from the hub."""
        return self.data_dir / "hub-home"

    @property
    def launchers(self) -> tuple[str, ...]:
        """The launchers that jobs may ask for."""
        return ("local", "torchrun", *self.elsewhere)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Those of them whose jobs take nothing of this machine."""
        return ("ray",) if self.ray else ()

    def folder(self, job: str) -> Path:
        """Where a job's files lie."""
        return self.data_dir / "jobs" / job

    def log(self, job: str) -> Path:
        """What a job prints."""
        return self.folder(job) / "log.txt"

    def run_folder(self, job: str) -> Path:
        """Where a job's products lie."""
        return self.folder(job) / "run"

    def prepare(self) -> None:
        """Make the folders, closed to other users of the machine."""
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.data_dir / "jobs").mkdir(exist_ok=True)
        self.nowhere.mkdir(exist_ok=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in LOOPBACK or host.startswith("127.")
