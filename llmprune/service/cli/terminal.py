"""Jobs on a terminal: a table, a progress bar, the end of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
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


def show_progress(events: Iterable[dict[str, Any]], final: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Show a bar on a terminal, or a line for each new step elsewhere; return the ended job."""
    console = PlainConsole(stderr=True)
    last_line = ""
    with Progress(
        BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False), console=console,
        disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=1.0)
        for event in events:
            progress.update(bar, completed=event["fraction"], description=doing(event))
            state = state_words(event["state"])
            line = printable(f"{state}: {event['step']}" if event["step"] else state)
            if not console.is_terminal and line != last_line:
                last_line = line
                console.print(Text(line), soft_wrap=True)
    job = final()
    console.print(_state(job, f" after {duration(job['ran_seconds'])}"))
    if job["error"]:
        console.print(Text(printable_message(job["error"])), soft_wrap=True)
    return job


def _state(job: dict[str, Any], more: str = "") -> Text:
    """Return the state in its colour."""
    return Text(printable(state_words(job["state"])) + more, STYLES.get(job["state"], ""))


def state_words(state: str) -> str:
    """Return a state in words, such as ``gate not met``."""
    return state.replace("_", " ")
