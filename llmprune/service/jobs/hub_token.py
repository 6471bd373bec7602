"""A job's own hub token, and what was pulled with it: only the service can read them, as long as the job needs them.

The token is in no database, no environment and no command line; the hub's client reads the file that
HF_TOKEN_PATH names. Where a library puts the token into the log, stars take its place.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmprune.service.environment import hub_variables

_FILE = "hub-token"
_HOME = "hub-home"


def keep_token(folder: Path, token: str) -> None:
    """Write a job's token, readable by this user alone from the first moment."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{_FILE}.partial"
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token)
    os.replace(beside, folder / _FILE)


def own_hub(folder: Path) -> dict[str, str]:
    """Return the variables by which a job uses its own token, and a cache that nobody else reads."""
    return hub_variables(folder / _HOME) | {"HF_TOKEN_PATH": str(folder / _FILE)}


def has_token(folder: Path) -> bool:
    """Whether a job has a token of its own."""
    return (folder / _FILE).is_file()


def drop_token(folder: Path, log: Path) -> None:
    """Forget what was pulled with the token, take the token out of the log for good, then forget it."""
    path = folder / _FILE
    shutil.rmtree(folder / _HOME, ignore_errors=True)  # what is left of it is read by nobody, and goes with the job
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
