"""Interface of the launchers: start an attempt at a job, poll it, stop it.

A launcher needs nothing in memory to find its jobs: after a restart it finds them by job id and attempt number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

from llmprune.common.errors import LLMPruneError
from llmprune.service.artifacts.parts import Use
from llmprune.service.settings import Settings


@dataclass(frozen=True)
class Launch:
    """One attempt at a job."""

    job: str
    attempt: int
    folder: Path  # the job's folder
    arguments: tuple[str, ...]  # of llmprune
    gpus: int
    devices: tuple[str, ...]  # GPUs of this machine; empty where another machine assigns them
    environment: Mapping[str, str]
    keep_hub: bool = False  # use the hub token and cache of the user who started the service
    log_limit: int = 256 * 10**6  # bytes of the log above which the job is ended
    uses: tuple[Use, ...] = ()  # files of other jobs that the attempt needs

    @property
    def log(self) -> Path:
        """Log file that all attempts append to."""
        return self.folder / "log.txt"

    @property
    def working_dir(self) -> Path:
        """Empty working directory of the run: no hub id can be the name of a folder in it."""
        return self.folder / "nowhere"

    @property
    def exit_file(self) -> Path:
        """File that holds the attempt's exit code once it has ended."""
        return self.folder / f"attempt-{self.attempt}.exit"


@dataclass(frozen=True)
class AttemptState:
    """State of an attempt at one moment.

    waiting: in the queue of another machine. running. ended: with ``code``. gone: ended without an exit code.
    returned: given back by another machine before it ran. lost: with its ``machine``. unknown: the other machine does
    not answer.
    """

    state: Literal["waiting", "running", "ended", "gone", "returned", "lost", "unknown"]
    code: int | None = None
    machine: str = ""


WAITING, RUNNING, GONE = AttemptState("waiting"), AttemptState("running"), AttemptState("gone")
RETURNED, UNKNOWN = AttemptState("returned"), AttemptState("unknown")


class NotNow(LLMPruneError):
    """Another machine cannot take an attempt at this moment; the message, such as "waits for …", is the job's step."""


class Launcher(ABC):
    """Base class of the launchers, which start, poll and stop attempts."""

    on_this_machine: ClassVar[bool] = True  # jobs use this machine's slots and GPUs
    gpu_host: ClassVar[str] = "this machine"  # machine whose GPUs limit a job, as messages name it

    @classmethod
    def is_offered(cls, settings: Settings) -> bool:
        """Return whether jobs may ask for this launcher."""
        del settings
        return True

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make the launcher."""

    def capacity(self) -> int:
        """Return how many more jobs may start now. Asked only of launchers that use another machine."""
        return 0

    def node_gpus(self) -> int | None:
        """Return the GPUs of the largest machine that jobs run on; None where the launcher cannot tell."""
        return None

    @abstractmethod
    def start(self, launch: Launch) -> None:
        """Start an attempt. Raises LLMPruneError where that is impossible, NotNow where it may be possible later."""

    @abstractmethod
    def poll(self, launch: Launch) -> AttemptState:
        """Return the state of an attempt."""

    @abstractmethod
    def stop(self, launch: Launch, force: bool) -> None:
        """Ask an attempt's processes to end; with ``force`` end them."""
