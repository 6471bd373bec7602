"""A tar archive as a stream whose length is known before any file is read, so that a download can continue.

The same files give the same bytes: names in order, one time for all, no owner. Links never get in.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_BLOCK = tarfile.BLOCKSIZE
_PART = 256 * 1024  # bytes read at once


class FileChanged(Exception):
    """A file is gone, is a link now, or has another length than when the archive began."""


@dataclass(frozen=True)
class Member:
    """A file of an archive.

    ``content``: its bytes, the path that they are read from, or a reader that yields them from a byte on; ``version``:
    of its bytes.
    """

    name: str
    size: int
    content: bytes | Path | Callable[[int], Iterator[bytes]]
    version: str = ""

    def read(self, start: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` on. Raises FileChanged."""
        if isinstance(self.content, bytes):
            yield self.content[start:]
            return
        if not isinstance(self.content, Path):
            yield from self.content(start)
            return
        try:
            descriptor = os.open(self.content, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise FileChanged(f"{self.name}: {error.strerror}") from error
        with open(descriptor, "rb", buffering=0) as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != self.size:
                raise FileChanged(f"{self.name} has changed")
            file.seek(start)
            left = self.size - start
            while left:
                part = file.read(min(left, _PART))
                if not part:
                    raise FileChanged(f"{self.name} has become shorter")
                left -= len(part)
                yield part


@dataclass(frozen=True)
class TarStream:
    """An archive of these members. ``time``: of all members, in seconds since 1970."""

    members: Sequence[Member]
    time: int

    @cached_property
    def size(self) -> int:
        """Bytes of the archive."""
        return sum(len(self._header(one)) + one.size + _padding(one.size) for one in self.members) + 2 * _BLOCK

    @cached_property
    def version(self) -> str:
        """Text that changes with the archive's bytes."""
        facts = [(one.name, one.size, one.version) for one in self.members]
        return hashlib.sha256(repr((self.time, facts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def read(self, start: int = 0) -> Iterator[bytes]:
        """Yield the archive's bytes from ``start`` on. Raises FileChanged."""
        skip = start
        for member in self.members:
            header, padding = self._header(member), bytes(_padding(member.size))
            if skip >= len(header) + member.size + len(padding):
                skip -= len(header) + member.size + len(padding)
                continue
            yield header[skip:]
            skip = max(0, skip - len(header))
            if skip < member.size:
                yield from member.read(skip)
            yield padding[max(0, skip - member.size) :]
            skip = 0
        yield bytes(2 * _BLOCK)[skip:]

    def _header(self, member: Member) -> bytes:
        entry = tarfile.TarInfo(member.name)
        entry.size, entry.mtime, entry.mode = member.size, self.time, 0o644
        return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> int:
    return -size % _BLOCK
