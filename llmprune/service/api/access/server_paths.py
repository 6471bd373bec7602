"""Renaming of the server's paths in what clients see.

A path in a job's folder becomes relative to that folder, a path under --allow-root relative to that root, and a folder
of --allow-tasks becomes its name, which recipes may use. Any other absolute path is reduced to its last part, as in
``…/modeling.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.service.recipe_policy.allowed_paths import task_folders
from llmprune.service.settings import Settings

_END = r"(?![^\s/'\"<>()\[\]{}|;:,])"  # the end of a path, or a slash
_PART = r"[^\s/'\"<>()\[\]{}|;:,]+"
# The first slash of an absolute path, and not that of ``and/or``, ``a/b``, ``./x``, ``~/x`` or ``https://``. Every
# pattern begins with the slash, because re finds a literal first character ten times as fast as anything else.
_BEGIN = r"(?:(?<![\w/.~*-]/)|(?<=file:///)|(?<=-[BFIL]/))"
_OTHER = rf"(?!v1/)(?:{_PART}/)+(?:{_PART})?"
_HIDDEN = "…"
_STEP = 100_000  # bytes that are searched at once
_MAX_PATH = 4_096  # bytes of a path on Linux


@dataclass(frozen=True)
class ServerPaths:
    """Patterns of all paths that have to be renamed, for text and for bytes."""

    text: re.Pattern[str]
    data: re.Pattern[bytes]
    task_folders: tuple[str, ...]  # names, indexed by the number in the name of the pattern's group

    @classmethod
    def of(cls, settings: Settings) -> ServerPaths:
        """Return the patterns for a service's folders."""
        jobs = _alternatives([settings.data_dir / "jobs"])
        roots = _alternatives(settings.allow_roots)
        tasks = [
            f"(?P<task{number}>{_alternatives([folder])}){_END}" for number, folder in enumerate(settings.allow_tasks)
        ]
        known = _alternatives([settings.data_dir, *settings.allow_roots, *settings.allow_tasks])  # may contain spaces
        rest = rf"(?:{known})(?:/(?:{_PART}/)*(?:{_PART})?|{_END})"
        root = [rf"(?P<root>(?:{roots})/(?=[^\s/]))"] if roots else []
        outside = "|".join([*tasks, *root, rest, _OTHER])
        pattern = f"/(?:(?P<inside>(?:{jobs})/[0-9a-f]{{12}}/)|{_BEGIN}(?:{outside}))"
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

    def hide_between(self, data: bytes, begin: int, *, end: int) -> bytes:
        """Return ``data[begin:end]`` with the paths renamed that begin there; the data around it completes them."""
        return b"".join(self._parts(data, begin, end=end))

    def _parts(self, data: bytes, begin: int, *, end: int) -> Iterator[bytes]:
        place = begin
        for found in self._found(data):
            if found.end() <= begin or found.start() >= end:
                continue
            yield data[place : found.start()]
            if found.start() >= begin:
                yield self._shown(found.lastgroup, found[0].decode("utf-8", "replace")).encode()
            place = found.end()
        yield data[place:end]

    def _found(self, data: bytes) -> Iterator[re.Match[bytes]]:
        """Find all paths in steps: a single search of a megabyte would block every other thread of the service."""
        place = 0
        while place < len(data):
            stop = min(place + _STEP, len(data))
            found = self.data.search(data, place, stop)
            if found is not None and found.end() == stop:
                found = self.data.match(data, found.start(), found.start() + _STEP)  # it may continue
            if found is not None:
                yield found
            place = found.end() if found else stop if stop == len(data) else stop - _MAX_PATH

    def _shown(self, group: str | None, path: str) -> str:
        if group in ("inside", "root"):
            return ""
        if group is not None:
            return self.task_folders[int(group.removeprefix("task"))]
        return f"{_HIDDEN}/{path.rstrip('/').rsplit('/', 1)[-1]}"


def _alternatives(folders: Iterable[Path]) -> str:
    """Return a pattern of folders, as absolute and as resolved paths without the first slash, the longest first."""
    found = {str(form) for folder in folders for form in (folder.absolute(), folder.resolve())}
    return "|".join(re.escape(text[1:]) for text in sorted(found - {"/"}, key=len, reverse=True))
