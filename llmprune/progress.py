"""Progress bars on a terminal, silence elsewhere; and for a service that asks, a file that says how far the run is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llmprune.console import PlainConsole

FILE = "LLMPRUNE_PROGRESS"  # the variable that names the file


def tell(step: str, done: int | None = None, total: int | None = None, since: float | None = None) -> None:
    """Write how far a step is into the file that the environment names, if it names one.

    ``since``: time.monotonic() when the step began. Of several processes the first one tells.
    """
    path = os.environ.get(FILE)
    if not path or os.environ.get("RANK", "0") != "0":
        return
    seconds = time.monotonic() - since if since is not None else None
    with suppress(OSError):  # a full disk must not end a run because of this
        beside = Path(f"{path}.partial")
        beside.write_text(json.dumps({"step": step, "done": done, "total": total, "seconds": seconds}))
        beside.replace(path)


def track(items: Iterable[int], what: str) -> Iterator[int]:
    """Go through layers with a bar: how many are done, time spent, time left."""
    console = PlainConsole(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    told = _told(items, what, total)
    if not console.is_terminal:
        yield from told
        return
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(told, total=total, description=what)


def _told(items: Iterable[int], what: str, total: int | None) -> Iterator[int]:
    """The items, each told when it begins."""
    since = time.monotonic()
    for done, item in enumerate(items):
        tell(what, done, total, since)
        yield item


def quiet_libraries() -> None:
    """Where nobody watches, the libraries draw no bars either."""
    if PlainConsole(stderr=True).is_terminal:
        return
    import datasets
    import transformers.utils.logging
    from huggingface_hub.utils import disable_progress_bars

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()
