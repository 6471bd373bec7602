"""A job of the service as notebooks and terminals show it."""

from __future__ import annotations

import time
from typing import Any, Self

from llmprune.common.notebook import NotebookProgress, bar_html, in_notebook
from llmprune.common.printing import printable
from llmprune.results.formatting import byte_size, change, duration, percent
from llmprune.service.api.values import JobEvent
from llmprune.service.cli.status_line import status_line
from llmprune.service.cli.terminal import TerminalProgress, doing, state_words
from llmprune.service.jobs.job import Job, JobSummary
from llmprune.service.monitoring.run_progress import RunProgress
from llmprune.service.monitoring.usage import JobUse

_ASK_EVERY = 5.0  # seconds
_STYLES = {"succeeded": "success", "failed": "danger", "queued": "info", "running": "info"}


def bundle_of(job: JobSummary) -> dict[str, str]:
    """Return a job as text and as HTML, for notebooks."""
    text = outcome(job) if job.ended else doing(job.model_dump())
    html = bar_html(job.name, text, fraction=job.fraction, style=style_of(job.state))
    return {"text/plain": f"job {job.id} {printable(job.name)}: {printable(text)}", "text/html": html}


def outcome(job: JobSummary) -> str:
    """Describe an ended job in one line: its state, run time, size and retention, or its error."""
    parts = [f"{state_words(job.state)} after {duration(job.ran_seconds)}"]
    if job.figures:
        before, after = job.figures.bytes
        parts.append(f"{byte_size(before)} → {byte_size(after)} ({change(before, after)})")
        if job.figures.retention is not None:
            parts.append(f"{percent(job.figures.retention)} retained")
    if job.error:
        parts.append(job.error.partition("\n")[0])
    return ", ".join(parts)


def describe_failure(job: JobSummary) -> str:
    """Return the sentence of JobFailed."""
    return f"job {job.id} ({job.name}): {outcome(job)}; see its log"


def style_of(state: str) -> str:
    """Return the style of a state's bar."""
    return _STYLES.get(state, "warning")


class JobProgress:
    """Progress of a job in the cell of a notebook, or on standard error."""

    def __init__(self, job: JobSummary) -> None:
        self._job = job
        self._status, self._asked = "", float("-inf")
        self._notebook = NotebookProgress(job.name) if in_notebook() else None
        self._terminal = None if self._notebook else TerminalProgress()

    def __enter__(self) -> Self:
        if self._terminal:
            self._terminal.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._terminal:
            self._terminal.__exit__(kind)
        elif self._notebook and kind is not None:
            self._notebook.end("no longer watched; .progress() shows it again", style="warning", fraction=None)

    def is_status_due(self) -> bool:
        """Return whether the status is to be asked for, which is so every few seconds, and count it as asked."""
        now = time.monotonic()
        if now - self._asked < _ASK_EVERY:
            return False
        self._asked = now
        return True

    def note(self, progress: RunProgress, use: JobUse) -> None:
        """Note what else is known about the job; shown with the next event."""
        self._status = status_line(progress, use)
        if self._terminal:
            self._terminal.note(self._status)

    def show(self, event: JobEvent) -> None:
        """Show an event."""
        now: dict[str, Any] = event.model_dump()
        if self._terminal:
            self._terminal.show(now)
        elif self._notebook:
            self._notebook.show(", ".join(filter(None, (doing(now), self._status))), event.fraction)

    def end(self, job: Job) -> None:
        """Show the end of the job."""
        if self._terminal:
            self._terminal.end(job.model_dump())
        elif self._notebook:
            self._notebook.end(outcome(job), style=style_of(job.state), fraction=job.fraction)
