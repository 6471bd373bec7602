"""Lines of a job's log for people: those before or after a byte of it, all of them or those that match a search.

A log may have 256 MB. It is read block by block, from a byte backwards or forwards, and one answer reads a bounded
part; the next one continues where it stopped. A line matches in the form in which it is shown, without the job's token
and the server's paths, so that no search can find out either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmprune.common.printing import printable

Level = Literal["error", "warning", ""]
BLOCK = 256 * 1024  # bytes that are read at once, and the most of one line; a longer line is shown as several
MOST_SCANNED = 32 * 2**20  # bytes that one answer reads
MAX_LINE = 2_000  # characters of a line that are shown
_MOST_CANDIDATES = 2_000  # lines that one answer compares with the filter

_ERROR = re.compile(r"^(?:ERROR|CRITICAL)\b|^llmprune: (?!note|warning)|^Traceback \(|^[\w.]*(?:Error|Exception)\b")
_WARNING = re.compile(r"^WARNING\b|^llmprune: warning|\b\w*Warning:|^warn", re.IGNORECASE)
_SEVERE = (b"error", b"exception", b"warn", b"critical", b"traceback", b"llmprune: ")  # in lines that may be either


@dataclass(frozen=True)
class LogLine:
    """Line of a log. ``at``: byte at which it begins."""

    at: int
    text: str
    level: Level


@dataclass(frozen=True)
class LogPage:
    """Lines in the order of the log, and the bytes before and after which the next ones lie.

    ``is_complete``: False where the part that one answer may read ended before it had enough lines.
    """

    lines: tuple[LogLine, ...]
    before: int
    after: int
    is_complete: bool = True


@dataclass(frozen=True)
class LogFilter:
    """Selection of lines. ``text``: that they contain, whatever the case; ``level``: at least this severe."""

    text: str = ""
    level: Level = ""

    def may_match(self, raw: bytes) -> bool:
        """Return whether a line may be selected, before it is cleaned."""
        if not self.text and not self.level:
            return True
        lower = raw.lower()
        if self.level and not any(word in lower for word in _SEVERE):
            return False
        # what is shown in place of secrets, paths and unprintable characters is not in the raw line
        plain = self.text.isascii() and not set(self.text) & set("*\\")
        return not plain or self.text.lower().encode() in lower

    def matches(self, line: LogLine) -> bool:
        """Return whether a line is selected."""
        is_severe = line.level == "error" or (self.level != "error" and bool(line.level))
        return (is_severe or not self.level) and self.text.casefold() in line.text.casefold()


@dataclass(frozen=True)
class Log:
    """A log file. ``shown``: returns the bytes from one place to another without what clients may not see."""

    path: Path
    shown: Callable[[int, int], bytes]

    def end(self, whole_lines: bool) -> int:
        """Return the end of the log; with ``whole_lines`` that of its last complete line."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return 0
        last = self._read(max(0, size - BLOCK), size)
        return size - len(last) + last.rfind(b"\n") + 1 if whole_lines and b"\n" in last else size

    def before(self, place: int, wanted: LogFilter, *, count: int) -> LogPage:
        """Return the last ``count`` of the selected lines that end before a byte."""
        found: list[LogLine] = []
        reached, candidates, limit = place, 0, max(0, place - MOST_SCANNED)
        for at, raw in self._backwards(place, limit, wanted=wanted):
            reached = at
            if wanted.may_match(raw):
                candidates += 1
                line = self._line(at, raw)
                found += [line] if wanted.matches(line) else []
            if len(found) == count or candidates == _MOST_CANDIDATES:
                break
        complete = len(found) == count or reached == 0
        return LogPage(tuple(reversed(found)), before=reached, after=place, is_complete=complete)

    def since(self, place: int, wanted: LogFilter, *, count: int) -> LogPage:
        """Return the first ``count`` of the selected complete lines that begin at a byte or after it."""
        found: list[LogLine] = []
        after, candidates = place, 0
        size = self.end(whole_lines=True)
        limit = min(size, place + MOST_SCANNED)
        for at, raw in self._forwards(place, limit, wanted=wanted):
            after = at + len(raw)
            if wanted.may_match(raw):
                candidates += 1
                line = self._line(at, raw)
                found += [line] if wanted.matches(line) else []
            if len(found) == count or candidates == _MOST_CANDIDATES:
                break
        return LogPage(tuple(found), before=place, after=after, is_complete=len(found) == count or after >= size)

    def _backwards(self, place: int, limit: int, *, wanted: LogFilter) -> Iterator[tuple[int, bytes]]:
        """Yield the lines between two bytes with the places where they begin, the last one first.

        A block without any line that may be selected is one empty line.
        """
        end = place
        while end > limit:
            begin = max(limit, end - BLOCK)
            data = self._read(begin, end)
            first = data.find(b"\n", 0, -1) + 1 if begin > 0 else 0  # where the first line of the block begins
            lines = data[first:]
            yield from reversed(_split(lines, begin + first) if wanted.may_match(lines) else [(begin + first, b"")])
            end = begin + first

    def _forwards(self, place: int, limit: int, *, wanted: LogFilter) -> Iterator[tuple[int, bytes]]:
        """Yield the lines between two bytes with the places where they begin.

        A block without any line that may be selected is one empty line, after it.
        """
        begin = place
        while begin < limit:
            data = self._read(begin, min(limit, begin + BLOCK))
            whole = data[: data.rfind(b"\n") + 1] or data
            yield from _split(whole, begin) if wanted.may_match(whole) else [(begin + len(whole), b"")]
            begin += len(whole)
            if not whole:
                return

    def _line(self, at: int, raw: bytes) -> LogLine:
        text = self.shown(at, at + len(raw)).decode("utf-8", "replace").rstrip("\r\n")
        last = text.rpartition("\r")[2]  # of a bar that was drawn again and again
        cut = printable(last[:MAX_LINE].replace("\t", "    ")) + (" …" if len(last) > MAX_LINE else "")
        return LogLine(at, cut, level_of(cut))

    def _read(self, begin: int, end: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                return file.read(end - begin)
        except OSError:
            return b""


def level_of(line: str) -> Level:
    """Return how severe a line is."""
    if _ERROR.search(line):
        return "error"
    return "warning" if _WARNING.search(line) else ""


def _split(data: bytes, at: int) -> list[tuple[int, bytes]]:
    """Split bytes after each line feed, with the place of each line."""
    found, place = [], at
    for line in data.splitlines(keepends=True) if b"\r" not in data else re.findall(rb"[^\n]*\n|[^\n]+", data):
        found.append((place, line))
        place += len(line)
    return found
