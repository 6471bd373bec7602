"""Checks of file names from untrusted content: plain relative paths, resolved through all links before use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SNAPSHOT_OF = re.compile(r"(models|datasets)--.+")  # a repository's folder in the hub client's cache


def is_plain_path(name: object) -> bool:
    """Check that a name is a relative path without ``..``, scheme, drive, backslash or unprintable characters."""
    return (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not name.startswith(("/", "~"))
        and not any(sign in name for sign in "\\:")
        and ".." not in name.split("/")
    )


def is_inside(path: Path, folder: Path) -> bool:
    """Check that a path lies below a folder after all links are resolved.

    A snapshot in the hub client's cache consists of links to the blobs of that cache, which count as part of it.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(resolved != root and resolved.is_relative_to(root) for root in _roots(folder))


def first_link_outside(paths: Iterable[Path], folder: Path) -> Path | None:
    """Return the first of ``paths`` that is a link to a place outside the folder; None where there is none."""
    return next((path for path in paths if path.is_symlink() and not is_inside(path, folder)), None)


def _roots(folder: Path) -> tuple[Path, ...]:
    whole = folder.resolve()
    repository = whole.parent.parent
    if whole.parent.name == "snapshots" and _SNAPSHOT_OF.fullmatch(repository.name):
        return whole, repository / "blobs", repository.parent / "blobs"  # all repositories share the last
    return (whole,)
