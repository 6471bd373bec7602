"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def track(items: Iterable[int], what: str) -> Iterator[int]:
    """Go through layers with a bar: how many are done, time spent, time left."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = len(items) if isinstance(items, Sized) else None
        yield from progress.track(items, total=total, description=what)


def quiet_libraries() -> None:
    """Where nobody watches, the libraries draw no bars either."""
    if Console(stderr=True).is_terminal:
        return
    import datasets
    import transformers.utils.logging
    from huggingface_hub.utils import disable_progress_bars

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()
