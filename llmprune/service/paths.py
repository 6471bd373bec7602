"""Paths of the server, as clients may see them.

A path in a job's folder is named relative to it, a path under --allow-root relative to that root, and a folder of
--allow-tasks by its name, which recipes may use. Of any other absolute path only the last part is shown, as in
``…/modeling.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.service.guard import task_folders
from llmprune.service.settings import Settings

_END = r"(?![^\s/'\"<>()\[\]{}|;:,])"  # a path ends here, or goes on with a slash
_PART = r"[^\s/'\"<>()\[\]{}|;:,]+"
_ELSEWHERE = rf"(?:(?<![\w/.:~*-])|(?<=file://))/(?!v1/)(?:{_PART}/)+(?:{_PART})?"
_HIDDEN = "…"


@dataclass(frozen=True)
class Paths:
    """The patterns of all paths that have to be renamed, for text and for bytes."""

    text: re.Pattern[str]
    data: re.Pattern[bytes]
    task_folders: tuple[str, ...]  # names, by the number in the pattern's group

    @classmethod
    def of(cls, settings: Settings) -> Paths:
        """Return the patterns for a service's folders."""
        jobs = _alternatives(_spellings([settings.data_dir / "jobs"]))
        roots = _alternatives(_spellings(settings.allow_roots))
        tasks = [
            f"(?P<task{number}>{_alternatives(_spellings([folder]))}){_END}"
            for number, folder in enumerate(settings.allow_tasks)
        ]
        inside = [f"(?P<inside>(?:{jobs})/[0-9a-f]{{12}}/)", *([f"(?P<root>(?:{roots})/(?=[^\\s/]))"] if roots else [])]
        pattern = "|".join([*tasks, *inside, _ELSEWHERE])
        names = tuple(task_folders(settings))
        return cls(re.compile(pattern), re.compile(pattern.encode()), names)

    def hide(self, text: str) -> str:
        """Return a text with the server's paths renamed."""
        return self.text.sub(lambda found: self._shown(found.lastgroup, found[0]), text)

    def hide_in(self, value: Any) -> Any:
        """Return JSON data with the server's paths in all of its texts renamed."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {key: self.hide_in(inner) for key, inner in value.items()}
        return [self.hide_in(inner) for inner in value] if isinstance(value, list | tuple) else value

    def hide_between(self, data: bytes, begin: int, end: int) -> bytes:
        """Return ``data[begin:end]`` with the paths renamed that begin there; what lies around it completes them."""
        return b"".join(self._parts(data, begin, end))

    def _parts(self, data: bytes, begin: int, end: int) -> Iterator[bytes]:
        place = begin
        for found in self.data.finditer(data):
            if found.end() <= begin or found.start() >= end:
                continue
            yield data[place : found.start()]
            if found.start() >= begin:
                yield self._shown(found.lastgroup, found[0].decode("utf-8", "replace")).encode()
            place = found.end()
        yield data[place:end]

    def _shown(self, group: str | None, path: str) -> str:
        if group in ("inside", "root"):
            return ""
        if group is not None:
            return self.task_folders[int(group.removeprefix("task"))]
        return f"{_HIDDEN}/{path.rstrip('/').rsplit('/', 1)[-1]}"


def _spellings(folders: Iterable[Path]) -> list[str]:
    """Return each folder as it was given, absolute and without links; the longest first."""
    found = {str(form) for folder in folders for form in (folder, folder.absolute(), folder.resolve())}
    return sorted(found - {os.sep, "."}, key=len, reverse=True)


def _alternatives(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, texts))
