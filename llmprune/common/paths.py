"""Names that foreign content gives: plain relative paths, resolved with all links before anything opens them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SNAPSHOT_OF = re.compile(r"(models|datasets)--.+")  # a repository's folder in the hub client's cache


def is_plain_path(name: object) -> bool:
    """Check that a name is a relative path without ``..``, scheme, drive, backslash or unprintable character."""
    return (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not name.startswith(("/", "~"))
        and not any(sign in name for sign in "\\:")
        and ".." not in name.split("/")
    )


def is_inside(path: Path, folder: Path) -> bool:
    """Check that a path, all links resolved, lies below its folder.

    A snapshot in the hub client's cache is made of links into the stores of that cache; they count as the folder.
    """
    try:
        place = path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    return any(place != home and place.is_relative_to(home) for home in _homes(folder))


def first_link_outside(paths: Iterable[Path], folder: Path) -> Path | None:
    """Return the first of a folder's entries that is a link leading out of it."""
    return next((path for path in paths if path.is_symlink() and not is_inside(path, folder)), None)


def _homes(folder: Path) -> tuple[Path, ...]:
    whole = folder.resolve()
    repository = whole.parent.parent
    if whole.parent.name == "snapshots" and _SNAPSHOT_OF.fullmatch(repository.name):
        return whole, repository / "blobs", repository.parent / "blobs"  # the last is shared by all repositories
    return (whole,)
