"""Jobs on a terminal: a table, a progress bar, the end of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich import box
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from llmprune.common.console import PlainConsole
from llmprune.common.printing import printable, printable_message
from llmprune.common.time_left import rough_duration
from llmprune.results.formatting import duration, percent

STYLES = {
    "succeeded": "green", "failed": "red", "running": "cyan", "cancelling": "yellow",
    "gate_not_met": "yellow", "gate_undecided": "yellow",
}  # fmt: skip


def print_jobs(jobs: Iterable[dict[str, Any]]) -> None:
    """Print a table with a row for each job."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in ("id", "state", "name", "owner"):
        table.add_column(head, overflow="fold")
    for head in ("done", "ran", "retained"):
        table.add_column(head, justify="right")
    for job in jobs:
        retention = (job["figures"] or {}).get("retention")
        table.add_row(
            printable(job["id"]), _state(job), printable(job["name"]), printable(job["owner"]),
            percent(job["fraction"], 0), duration(job["ran_seconds"]),
            percent(None if retention is None else float(retention)),
        )  # fmt: skip
    PlainConsole().print(table)


def print_models(models: Iterable[dict[str, Any]]) -> None:
    """Print a table with a row for each model."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in ("id", "stage", "name", "base", "tags", "owner"):
        table.add_column(head, overflow="fold")
    table.add_column("retained", justify="right")
    for model in models:
        retention = (model["figures"] or {}).get("retention")
        table.add_row(
            printable(model["id"]), printable(model["stage"]), printable(model["name"]), printable(model["base"]),
            printable(" ".join(model["tags"])), printable(model["owner"]),
            percent(None if retention is None else float(retention)),
        )  # fmt: skip
    PlainConsole().print(table)


@contextmanager
def showing_bytes() -> Iterator[Callable[[int, int], None]]:
    """Show a bar of sent bytes on a terminal; the block calls what it gets with bytes sent and bytes in all."""
    console = PlainConsole(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        yield lambda sent, total: progress.update(bar, completed=sent, total=total)


def doing(job: dict[str, Any]) -> str:
    """Describe a job's step, as ``pass 2: cut and refit, layer 12 of 28, about 40 s left in this step``."""
    parts = [printable(job["step"] or state_words(job["state"]))]
    if job["total"] and job["done"] is not None:
        one = "step" if job.get("detail") else "layer"  # of a training, or of the model
        parts.append(f"{one} {job['done'] + 1} of {job['total']}")
    if job.get("detail"):
        parts.append(printable(job["detail"]))
    if job.get("seconds_left"):
        parts.append(f"about {duration(round(job['seconds_left'])).replace('.0 s', ' s')} left in this step")
    if job.get("run_seconds_left"):
        parts.append(f"about {rough_duration(job['run_seconds_left'])} left in all")
    return ", ".join(parts)


class TerminalProgress:
    """Progress of a job on standard error: a bar on a terminal, or a line for each new step elsewhere."""

    def __init__(self) -> None:
        self._console = PlainConsole(stderr=True)
        self._last_line = ""
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[line]}{task.fields[below]}", markup=False),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._bar = self._progress.add_task("", total=1.0, line="", below="")
        self._place = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show an event."""
        self._progress.update(self._bar, completed=event["fraction"], line=doing(event))
        state = state_words(event["state"])
        line = printable(f"{state}: {event['step']}" if event["step"] else state)
        if not self._console.is_terminal and line != self._last_line:
            self._last_line = line
            place = f": {self._place}" if event["state"] == "queued" and self._place else ""
            self._console.print(Text(line + place), soft_wrap=True)

    def note(self, status: str) -> None:
        """Show a status below the bar; elsewhere it is printed only with the line of a job that waits."""
        self._place = status
        self._progress.update(self._bar, below=f"\n{status}" if status else "")

    def end(self, job: dict[str, Any]) -> None:
        """Print how the job ended."""
        self._progress.stop()
        self._console.print(_state(job, f" after {duration(job['ran_seconds'])}"))
        if job["error"]:
            self._console.print(Text(printable_message(job["error"])), soft_wrap=True)


def _state(job: dict[str, Any], more: str = "") -> Text:
    """Return the state in its colour."""
    return Text(printable(state_words(job["state"])) + more, STYLES.get(job["state"], ""))


def state_words(state: str) -> str:
    """Return a state in words, such as ``gate not met``."""
    return state.replace("_", " ")
