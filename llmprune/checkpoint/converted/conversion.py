"""Checkpoints that are made once from other files, such as GGUF, in a cache under HF_HOME.

A folder is named by the content that it is made from, is made beside its place and renamed, and is never changed.
Before the weights are needed, a smaller folder is made with the config and the tokenizer alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llmprune.common.files import apply_umask, disk_errors, fsync, sha256_of

logger = logging.getLogger(__name__)

_WITHOUT_WEIGHTS = "-config"  # end of the name of the smaller folder


@dataclass(frozen=True)
class Conversion:
    """An ordinary checkpoint that is made from other files.

    ``name``: of its folder, with a hash of the content; ``shown``: what is converted, for the user; ``note``: of a plan
    before it is converted, where ``{dtype}`` is the type of the computation, ``{memory}`` the bytes of the weights in
    float32; ``describe`` and ``convert``: write the config and the tokenizer, or the whole checkpoint, into a folder;
    ``base``: hub id or folder of the model that an adapter is merged into; ``is_base_pickled``: its weights are read
    from pickles.
    """

    name: str
    shown: str
    note: str
    describe: Callable[[Path], None]
    convert: Callable[[Path], None]
    base: str | None = None
    is_base_pickled: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the whole checkpoint, which may not exist yet."""
        from huggingface_hub.constants import HF_HOME

        return Path(HF_HOME) / "llmprune" / self.name

    def place(self, *, whole: bool) -> Path:
        """Return a folder with the config and the tokenizer, or with the ``whole`` checkpoint; make it where needed.

        Raises DiskError where the cache cannot be written, and what the conversion raises.
        """
        if self.folder.is_dir():
            return self.folder
        if not whole:
            return _made(self.folder.with_name(self.name + _WITHOUT_WEIGHTS), self.describe)

        def convert(folder: Path) -> None:
            logger.info("converting %s once, into %s", self.shown, self.folder)
            self.convert(folder)

        return _made(self.folder, convert)


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return a folder, which is written beside its place and renamed where it does not exist yet."""
    if folder.is_dir():
        return folder
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            if not folder.is_dir():  # another process may have been first
                inner = Path(made) / folder.name
                inner.mkdir()
                write(inner)
                for file in inner.rglob("*"):
                    apply_umask(file)
                    fsync(file)
                os.rename(inner, folder)
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine makes the same folder."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest_of(*contents: Path | str) -> str:
    """Return a hash of files' contents and of texts, for the name of a folder."""
    whole = hashlib.sha256()
    for content in contents:
        if isinstance(content, Path):
            state = content.stat()
            content = _hash_of(content, size=state.st_size, modified=state.st_mtime_ns)
        whole.update(f"{len(content)}:{content}".encode())
    return whole.hexdigest()[:12]


@lru_cache
def _hash_of(path: Path, *, size: int, modified: int) -> str:
    """Hash a file's content, once for each of its states: ``size`` in bytes, ``modified`` in nanoseconds."""
    return sha256_of(path)
