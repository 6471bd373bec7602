"""The small interface behind which jobs run: start, look, stop.

A launcher keeps nothing in memory that it could not do without: after a restart it finds
a job again by the job's id alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True)
class Launch:
    """One attempt at a job."""

    job: str
    attempt: int
    folder: Path  # the job's own
    arguments: tuple[str, ...]  # of llmprune
    gpus: int
    devices: tuple[str, ...]  # which of this machine's GPUs; none where another machine decides
    environment: Mapping[str, str]
    keep_hub: bool = False  # whether it uses the hub's token and cache of whoever started the service

    @property
    def log(self) -> Path:
        """Where all attempts write what they say."""
        return self.folder / "log.txt"

    @property
    def exit_file(self) -> Path:
        """Where the attempt's exit code is written."""
        return self.folder / f"attempt-{self.attempt}.exit"


@dataclass(frozen=True)
class Look:
    """What became of an attempt.

    It waits elsewhere, runs, ended with a code, is gone without one, was given back before it
    ran; or nobody knows for now.
    """

    state: Literal["waiting", "running", "ended", "gone", "returned", "unknown"]
    code: int | None = None


WAITING, RUNNING, GONE = Look("waiting"), Look("running"), Look("gone")
RETURNED, UNKNOWN = Look("returned"), Look("unknown")


class Launcher(Protocol):
    """Where attempts run."""

    on_this_machine: bool  # whether jobs take this machine's slots and GPUs

    def room(self) -> int:
        """How many more jobs it takes now, where they take nothing of this machine."""

    def start(self, launch: Launch) -> None:
        """Start an attempt. Raises LLMPruneError where that cannot be done."""

    def look(self, launch: Launch) -> Look:
        """What became of it."""

    def stop(self, launch: Launch, force: bool) -> None:
        """Ask its processes to end, or end them."""
