"""Progress of a command: bars on a terminal, lines elsewhere, and a file for a service that asks for it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from llmprune.common.console import PlainConsole
from llmprune.common.local_processes import is_first_of_launcher
from llmprune.common.printing import printable
from llmprune.common.time_left import ExpectedPart, Forecast, TimeLeft, rough_duration
from llmprune.common.timeline import LAST, Timeline

PROGRESS_FILE = "LLMPRUNE_PROGRESS"  # environment variable with the path of the file
_REPEAT_EVERY = 180.0  # seconds
_WORTH_SAYING = 60.0  # seconds that a run must have left for its new steps to say so


class _Lines:
    """Prints a line for each new step to standard error, and its progress every few minutes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step, self._began = "starting", time.monotonic()
        self._done: int | None = None
        self._total: int | None = None
        self._left: float | None = None  # seconds
        self._detail = ""

    def note(self, step: str, done: int | None, *, total: int | None, left: float | None, detail: str | None) -> None:
        """Record the progress of a step, and print a line where it is new. ``left``: seconds."""
        with self._lock:
            new = step != self._step
            if new:
                self._step, self._began = step, time.monotonic()
            self._done, self._total, self._left = done, total, left
            self._detail = f", {detail}" if detail else ""
            if new:
                whole = time_left()
                long = whole is not None and whole.seconds >= _WORTH_SAYING
                self._print((f", {total} to do" if total else "") + (_in_all(whole) if long else ""))

    def note_reused(self, step: str) -> None:
        """Print that a step is not repeated, because its result is in the run folder."""
        with self._lock:
            self._print(": reused", step)

    def repeat(self, stop: threading.Event) -> None:
        """Print the progress every few minutes until ``stop`` is set."""
        while not stop.wait(_REPEAT_EVERY):
            with self._lock:
                done = f", {self._done} of {self._total} done" if self._done is not None and self._total else ""
                left = f", about {_minutes(self._left)} left" if self._left is not None else ""
                whole = _in_all(time_left())
                self._print(f"{done}{self._detail}, for {_minutes(time.monotonic() - self._began)} now{left}{whole}")

    def _print(self, details: str, step: str | None = None) -> None:
        with suppress(OSError, ValueError):  # a run must not end because standard error is closed
            named = printable(step or self._step)
            print(f"{time.strftime('%H:%M:%S')} {named}{details}", file=sys.stderr, flush=True)


_lines: _Lines | None = None
_forecast: Forecast | None = None
_more_runs = False
_timeline = Timeline()
_tokens: tuple[str, int] | None = None  # step that passes tokens through the model, and how many
_listener: Callable[[Reported], None] | None = None


@dataclass(frozen=True)
class Reported:
    """Progress of a step. ``done`` of ``total`` items, such as layers; ``detail``: how it stands, in words.

    ``seconds``: since the step began; ``run_seconds_left``: of the whole run. None where unknown.
    """

    step: str
    done: int | None = None
    total: int | None = None
    seconds: float | None = None
    detail: str | None = None
    run_seconds_left: float | None = None


@contextmanager
def listening(listener: Callable[[Reported], None]) -> Iterator[None]:
    """Hand every report of progress to a function while the context lasts."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextmanager
def expecting(parts: Sequence[ExpectedPart]) -> Iterator[Forecast]:
    """Report the time left of the whole run, which has these parts in this order, while the context lasts."""
    global _forecast
    before, _forecast = _forecast, Forecast(parts)
    try:
        yield _forecast
    finally:
        _forecast = before


def time_left() -> TimeLeft | None:
    """Return the time left of the whole run; None where nothing is expected."""
    left = _forecast.left() if _forecast is not None else None
    return left and replace(left, is_complete=left.is_complete and not _more_runs)


@contextmanager
def more_runs_follow(follow: bool = True) -> Iterator[None]:
    """Count what is expected within the context as a part of the whole run only, because other runs follow it."""
    global _more_runs
    before, _more_runs = _more_runs, _more_runs or follow
    try:
        yield
    finally:
        _more_runs = before


def estimated_seconds(step: str) -> float | None:
    """Return the estimated seconds of a step of the run under way; None where there is no estimate."""
    return _forecast.estimate(step) if _forecast is not None else None


def report_reused(step: str) -> None:
    """Report that the result of a step exists, so that the step takes no time."""
    _timeline.reuse(step)
    if _forecast is not None:
        _forecast.reuse(step)
    if _lines is not None:
        _lines.note_reused(step)


@contextmanager
def lines_without_terminal() -> Iterator[None]:
    """Print a line for each step, and its progress every few minutes, unless standard error is a terminal."""
    global _lines
    if PlainConsole(stderr=True).is_terminal or not is_first_of_launcher():
        yield
        return
    stop = threading.Event()
    _lines = _Lines()
    thread = threading.Thread(target=_lines.repeat, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        _lines = None
        stop.set()
        thread.join()


def report_progress(
    step: str,
    done: int | None = None,
    *,
    total: int | None = None,
    since: float | None = None,
    detail: str | None = None,
    tokens: int | None = None,
) -> None:
    """Report the progress of a step in printed lines and in the progress file, where the environment names one.

    ``since``: time.monotonic() when the step began; ``detail``: how it stands, in words; ``tokens``: number that the
    step passes through the model. Only the first of several processes reports.
    """
    global _tokens
    if not is_first_of_launcher():
        return
    if tokens is not None:
        _tokens = step, tokens
    if _forecast is not None and step == LAST:
        _forecast.finish()
    elif _forecast is not None:
        _forecast.note(step, done, total=total, since=since)
    _timeline.note(step, _forecast)
    seconds = time.monotonic() - since if since is not None else None
    if _lines is not None:
        left = seconds / done * (total - done) if seconds and done and total else None
        _lines.note(step, done, total=total, left=left, detail=detail)
    path = os.environ.get(PROGRESS_FILE)
    if not path and _listener is None:
        return
    whole = time_left()
    left_in_all = round(whole.seconds, 1) if whole is not None and whole.is_known else None
    reported = Reported(step, done, total, seconds, detail, left_in_all)
    if _listener is not None:
        _listener(reported)
    if not path:
        return
    content = asdict(reported) | {
        "tokens": _tokens[1] if _tokens is not None and step.startswith(_tokens[0]) else None,
        "left": None if whole is None else asdict(whole),
        "steps": _timeline.steps(_forecast),
    }
    with suppress(OSError):  # a full disk must not end the run here
        temporary = Path(f"{path}.partial")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)


def track(items: Iterable[int], what: str, *, detail: Callable[[], str] | None = None) -> Iterator[int]:
    """Yield layers, with a progress bar that shows how many are done, time spent and time left.

    ``detail``: returns how the work stands, in words.
    """
    console = PlainConsole(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    reported = _reported(items, what, total=total, detail=detail)
    if not console.is_terminal:
        yield from reported
        return
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _LeftInAll(),
        *([] if detail is None else [_Detail(detail)]),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(reported, total=total, description=what)


class _LeftInAll(ProgressColumn):
    """Time left of the whole run, where it is known."""

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text(_in_all(time_left()).removeprefix(", "))


class _Detail(ProgressColumn):
    """Column of what the work says about itself."""

    def __init__(self, detail: Callable[[], str]) -> None:
        super().__init__()
        self._detail = detail

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text(self._detail())


def _reported(items: Iterable[int], what: str, *, total: int | None, detail: Callable[[], str] | None) -> Iterator[int]:
    """Yield the items and report each when it begins."""
    since = time.monotonic()
    for done, item in enumerate(items):
        report_progress(what, done, total=total, since=since, detail=detail and detail())
        yield item


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"


def _in_all(left: TimeLeft | None) -> str:
    """Return the time left of the whole run as the end of a line, such as ``, about 12 min left in all``."""
    if left is None:
        return ""
    return f", {'about' if left.is_complete else 'at least'} {rough_duration(left.seconds)} left in all"
