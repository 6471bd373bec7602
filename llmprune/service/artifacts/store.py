"""A shared folder or an object store that keeps the artefacts of jobs, by fsspec.

Keys of a job: ``JOB/recipe.yaml``, ``JOB/objects/…`` (contents of files), ``JOB/manifests/…`` (which files a run folder
has), ``JOB/status/ATTEMPT.json``, ``JOB/log/ATTEMPT/OFFSET`` and ``JOB/stop/ATTEMPT``. An object is part of a run
folder once a manifest lists it, and no manifest is ever changed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llmprune.common.errors import LLMPruneError, RecipeError

T = TypeVar("T")

_EXTRAS = {"s3": "s3", "s3a": "s3"}  # extra of llmprune with the package of a protocol
# Seconds and tries of one request: a store that is away must not block its caller for minutes.
_S3 = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2}}}
_PARTIAL = ".partial"


class StoreUnreachable(LLMPruneError):
    """The artefact store does not answer, or refuses."""


class ArtifactStore:
    """Objects under one URL, such as ``s3://bucket/prefix`` or ``file:///shared/llmprune``.

    Every method raises StoreUnreachable where the store fails. For ``pause`` seconds after a failure the methods fail
    at once, so that a store that is away does not block its caller again and again.
    """

    def __init__(self, url: str, *, pause: float = 0.0) -> None:
        """Raise RecipeError where the URL cannot be used, or its package is not installed."""
        self.url, self.pause = url.rstrip("/"), pause
        self._fs, self._root = _open(self.url)
        self._is_local = "file" in _protocols(self._fs)
        self._failed: tuple[float, StoreUnreachable] | None = None

    def check(self) -> None:
        """Write, read and remove an object."""
        key = f"check-{secrets.token_hex(4)}"
        self.write(key, b"llmprune")
        if self.read(key) != b"llmprune":
            raise StoreUnreachable(f"the artefact store {self.url} does not return what was written; check its URL")
        self.remove([key])

    def write(self, key: str, data: bytes) -> None:
        """Write a small object, which appears whole or not at all."""

        def work() -> None:
            if self._is_local:
                self._fs.pipe_file(self._path(key) + _PARTIAL, data)
                self._fs.mv(self._path(key) + _PARTIAL, self._path(key))
            else:
                self._fs.pipe_file(self._path(key), data)

        self._ask(work)

    def upload(self, path: Path, key: str) -> None:
        """Write a file of any size as an object."""
        self._ask(lambda: self._fs.put_file(str(path), self._path(key)))

    def read(self, key: str, *, begin: int | None = None, end: int | None = None) -> bytes | None:
        """Return an object, or its bytes from ``begin`` to before ``end``; None where there is none."""

        def work() -> bytes | None:
            try:
                return bytes(self._fs.cat_file(self._path(key), start=begin, end=end))
            except FileNotFoundError:
                return None

        return self._ask(work)

    def download(self, key: str, path: Path) -> bool:
        """Write an object to a file; return False where there is no such object."""

        def work() -> bool:
            try:
                self._fs.get_file(self._path(key), str(path))
            except FileNotFoundError:
                return False
            return True

        return self._ask(work)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys under a prefix that ends at a slash, sorted."""
        cut = len(self._root) + 1
        found = self._ask(lambda: self._fs.find(self._path(prefix)))
        return sorted(path[cut:] for path in found if not path.endswith(_PARTIAL))

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, whether or not they exist."""

        def work() -> None:
            if keys:
                there = [path for path in map(self._path, keys) if not self._is_local or Path(path).exists()]
                self._fs.rm(there) if there else None

        self._ask(work)

    def remove_job(self, job: str) -> None:
        """Remove every object of a job."""
        self.remove(self.keys(f"{job}/"))
        if self._is_local:  # its empty folders

            def work() -> None:
                if self._fs.exists(self._path(job)):
                    self._fs.rm(self._path(job), recursive=True)

            self._ask(work)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _ask(self, work: Callable[[], T]) -> T:
        if self._failed is not None and time.monotonic() < self._failed[0]:
            raise self._failed[1]
        try:
            answer = work()
        except Exception as error:  # the back-ends of fsspec raise exceptions of many libraries
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            failure = StoreUnreachable(
                f"the artefact store {self.url} cannot be used: {reason}; check its address, network and credentials"
            )
            self._failed = time.monotonic() + self.pause, failure
            raise failure from error
        self._failed = None
        return answer


def require_url(url: str) -> str:
    """Return the URL of a store. Raises RecipeError where it is none, or where it contains credentials."""
    parts = urlsplit(url)
    if not parts.scheme or "://" not in url:
        raise RecipeError(
            f"--artifacts {url}: give a URL, such as s3://bucket/prefix, or file:///folder for a shared folder"
        )
    if "@" in parts.netloc or parts.query:
        raise RecipeError(
            "--artifacts: leave user, password and options out of the URL; "
            "give them by the environment, such as AWS_ACCESS_KEY_ID, on this machine and on every node"
        )
    return url.rstrip("/")


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and its root. Raises RecipeError."""
    import fsspec

    protocol = urlsplit(url).scheme
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    options |= _S3 if protocol in ("s3", "s3a") else {}
    options |= {"auto_mkdir": True} if protocol == "file" else {}
    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        install = f"uv pip install 'llmprune[{extra}]'" if extra else str(error)
        raise RecipeError(f"--artifacts {url}: the package for {protocol}:// is not installed: {install}") from error
    except ValueError as error:
        raise RecipeError(f"--artifacts {url}: {error}; give s3://bucket/prefix or file:///folder") from error
    return fs, str(root).rstrip("/")


def _protocols(fs: Any) -> Iterable[str]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
