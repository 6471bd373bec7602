"""Tasks in the folders of ``--allow-tasks``, by the names that their files give them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llmprune.service.recipe_policy.allowed_paths import task_folders
from llmprune.service.settings import Settings

_NAME = re.compile(r"""^task:[ \t]*["']?([\w.-]{1,100})["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
_MOST_FILES, _MOST_BYTES, _MOST_TASKS = 500, 64_000, 12  # of a folder; of a file; that are listed


def local_tasks(settings: Settings) -> dict[str, str]:
    """Return the folder of each task, as recipes name it, by the task's name; some of them where there are many."""
    found: dict[str, str] = {}
    for folder, place in task_folders(settings).items():
        for task in _tasks(place):
            found.setdefault(task, folder)
            if len(found) >= _MOST_TASKS:
                return found
    return found


def _tasks(folder: Path) -> Iterator[str]:
    """Yield the names of the tasks in a folder, in the order of their files; groups have a list in place of a name."""
    for path in sorted(folder.rglob("*.yaml"))[:_MOST_FILES]:
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_BYTES).decode("utf-8", "replace")
        except OSError:
            continue
        if match := _NAME.search(text):
            yield match[1]
