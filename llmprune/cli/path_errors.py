"""Errors of the operating system about a path that a person gave, as a sentence with the remedy."""

from __future__ import annotations

import errno

_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "its links lead in a circle: correct them, or give another path",
    errno.EACCES: "check the permissions of it and of the folders that it is in, or give another path",
    errno.EPERM: "check the permissions of it and of the folders that it is in, or give another path",
    errno.EROFS: "the disk is read-only: give a path on another one",
}
_LONGEST = 80  # characters of a path that are shown


def path_problem(error: OSError) -> str | None:
    """Return the sentence for a path that cannot be used; None for another error."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None or error.filename is None:
        return None
    path = str(error.filename)
    shown = path if len(path) <= _LONGEST else f"{path[: _LONGEST // 2]}…{path[-_LONGEST // 2 :]}"
    return f"{shown} cannot be used ({error.strerror}); {remedy}"
