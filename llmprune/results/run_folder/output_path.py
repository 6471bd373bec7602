"""Checks of the folder that a run is to write, before the seconds that the large libraries take to import."""

from __future__ import annotations

from pathlib import Path

from llmprune.common.errors import OutputError
from llmprune.common.files import require_folder
from llmprune.common.local_processes import is_first_of_launcher
from llmprune.results.run_folder.products import JOURNAL, LOCK
from llmprune.results.run_folder.replacing import is_swapping


def require_run_folder(path: Path) -> None:
    """Check, without changing anything, that a run can be made or continued in a folder. Raises OutputError.

    Of several processes only the first one writes.
    """
    if not is_first_of_launcher():
        return
    require_folder(path)
    filled = path.is_dir() and any(entry.name != LOCK for entry in path.iterdir())
    if filled and not is_run(path):
        raise OutputError(
            f"the output folder {path} is not empty and is not the folder of a run; give a new or empty folder"
        )


def is_run(path: Path) -> bool:
    """Check that a folder is a run's; in the middle of a swap the journal is not in it."""
    return (path / JOURNAL).is_file() or is_swapping(path)
