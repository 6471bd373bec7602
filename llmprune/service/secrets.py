"""A job's own hub token: in a file that only the service can read, as long as the job needs it.

It is in no database, no environment and no command line; the hub's client reads the file that
HF_TOKEN_PATH names. Where a library puts the token into the log, stars take its place.
"""

from __future__ import annotations

import os
from pathlib import Path

_FILE = "hub-token"
_OTHERS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")  # where the hub's client looks first


def keep_token(folder: Path, token: str) -> None:
    """Write a job's token, readable by this user alone from the first moment."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{_FILE}.partial"
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token)
    os.replace(beside, folder / _FILE)


def token_environment(folder: Path, required: bool = False) -> dict[str, str]:
    """The variables with which a job finds its token; they also hide the service's own.

    A job without one goes by the service's, unless its own is ``required``.
    """
    path = folder / _FILE
    return {"HF_TOKEN_PATH": str(path), **dict.fromkeys(_OTHERS, "")} if required or path.is_file() else {}


def drop_token(folder: Path) -> None:
    """Take the token out of the log for good, then forget it."""
    path, log = folder / _FILE, folder / "log.txt"
    if not path.is_file():
        return
    if log.is_file():
        text = log.read_bytes()
        clean = redact(text, folder)
        if clean != text:
            with log.open("r+b") as file:  # in place, of the same length: that works on a full disk too
                file.write(clean)
    path.unlink()


def redact(text: bytes, folder: Path) -> bytes:
    """The text with stars for the job's token, of the same length."""
    try:
        token = (folder / _FILE).read_bytes()
    except OSError:
        return text
    return text.replace(token, b"*" * len(token)) if token else text
