"""Reader of the audit log: the newest lines first, from the end of files that may be large and rotated.

Files are read backwards in blocks: ``audit.jsonl``, then ``audit.jsonl.1`` and so on, as logrotate names them, also
where it compresses them. A page ends at its number of entries, or where enough of the files was read.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.logs import AUDIT

_BLOCK = 256 * 1024  # bytes
_MAX_LINE = 64 * 1024  # bytes; a longer line is skipped
_READ_AT_MOST = 32 * 1024 * 1024  # bytes for one page
_MAX_UNPACKED = 1024 * 1024 * 1024  # bytes of a compressed file that are unpacked
_NUMBER = re.compile(rf"{re.escape(AUDIT)}(?:[.-](\d+))?(\.gz)?")
_CURSOR = re.compile(r"(\d{1,20})-(\d{1,18})", re.ASCII)
_JOB_PLACE = re.compile(r"^(?:/v1)?/jobs/([0-9a-f]{12})$")


@dataclass(frozen=True)
class AuditQuery:
    """Selection of entries. ``since`` and ``until``: UTC, such as 2026-01-31T14:05:00Z, or the beginning of that."""

    user: str | None = None  # who did it, or whose account it changed
    action: str | None = None  # part of the action
    job: str | None = None
    since: str | None = None
    until: str | None = None
    before: str | None = None  # ``next`` of the page before
    limit: int = 50


@dataclass(frozen=True)
class AuditPage:
    """Entries, the newest first. ``next``: the cursor of the next page; None: nothing is left."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    next: str | None = None
    read_all: bool = True  # False: enough was read, though fewer entries were found than asked for


def read_audit(folder: Path, query: AuditQuery) -> AuditPage:
    """Return a page of the audit log in a data folder. Raises Conflict for a cursor of files that are gone."""
    found: list[dict[str, Any]] = []
    read, place = 0, ""
    needed = [_written(value) for value in (query.user, query.job, query.action) if value is not None]
    for place, line in _lines(folder, query.before):
        read += len(line) + 1
        # most lines are left out unparsed, which takes a tenth of the time
        entry = _entry(line) if not needed or _has(line, needed) else None
        if entry is not None:
            if query.since is not None and entry["time"] < query.since:
                return AuditPage(found)
            if _matches(entry, query):
                found.append(entry)
        if len(found) >= query.limit:
            return AuditPage(found, place)
        if read >= _READ_AT_MOST:
            return AuditPage(found, place, read_all=False)
    return AuditPage(found)


def _written(value: str) -> bytes:
    """Return a text as lines hold it, in lower case."""
    return json.dumps(value)[1:-1].lower().encode()


def _has(line: bytes, parts: list[bytes]) -> bool:
    lower = line.lower()
    return all(part in lower for part in parts)


def _matches(entry: dict[str, Any], query: AuditQuery) -> bool:
    if query.user is not None and query.user not in (entry.get("caller"), entry.get("user"), entry.get("token")):
        return False
    if query.action is not None and query.action.lower() not in str(entry.get("action", "")).lower():
        return False
    if query.job is not None and query.job != entry.get("job"):
        return False
    # a day or an hour as the end includes all of it
    return query.until is None or entry["time"][: len(query.until)] <= query.until


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None for one that a crash has cut, or that is no entry. A submission gets the job that it made."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("time"), str):
        return None
    made = _JOB_PLACE.match(str(entry.get("location") or ""))
    if made and not entry.get("job"):
        entry["job"] = made[1]
    return entry


def _lines(folder: Path, before: str | None) -> Iterator[tuple[str, bytes]]:
    """Yield each line with the cursor of its beginning, from the newest one, or from the cursor ``before``."""
    paths = _files(folder)
    start: int | None = None
    if before is not None:
        wanted = _CURSOR.fullmatch(before)
        numbers = [str(path.stat().st_ino) for path in paths]
        if wanted is None or wanted[1] not in numbers:
            raise Conflict("the audit log was rotated since this page was made; begin at its first page")
        paths, start = paths[numbers.index(wanted[1]) :], int(wanted[2])
    for path in paths:
        with _opened(path) as file:
            inode = path.stat().st_ino
            for offset, line in _backwards(file, start):
                yield f"{inode}-{offset}", line
        start = None


def _files(folder: Path) -> list[Path]:
    """Return the log and its older parts, the newest first: by logrotate's numbers or dates."""
    parts: list[tuple[int, Path]] = []
    for path in folder.glob(f"{AUDIT}*"):
        name = _NUMBER.fullmatch(path.name)
        if name and path.is_file():
            number = int(name[1] or 0)
            parts.append((-number if number > 10**7 else number - 10**9 if number else -(10**18), path))
    return [path for _, path in sorted(parts)]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a part of the log; a compressed one is unpacked into a temporary file, which has no name."""
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        try:
            with gzip.open(path) as packed:
                while unpacked.tell() < _MAX_UNPACKED and (block := packed.read1(_BLOCK)):
                    unpacked.write(block)
        except (OSError, EOFError, zlib.error):
            pass  # damaged: what could be unpacked is shown
        yield unpacked


def _backwards(file: BinaryIO, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of each line before ``end``, the last one first."""
    size = file.seek(0, os.SEEK_END)
    position = size if end is None else min(end, size)
    rest = b""  # the beginning of a line whose end was read
    while position > 0:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        block = file.read(step) + rest
        first, *lines = block.split(b"\n")
        offset = position + len(block)
        for line in reversed(lines):
            offset -= len(line)
            if line and len(line) <= _MAX_LINE:
                yield offset, line
            offset -= 1
        rest = first if len(first) <= _MAX_LINE else b"?" * (_MAX_LINE + 1)
    if rest and len(rest) <= _MAX_LINE:
        yield 0, rest
