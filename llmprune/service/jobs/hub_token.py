"""A job's own hub token and its hub cache. Only the service can read them, and only while the job needs them.

The token is in no database, environment or command line: the hub's client reads the file that HF_TOKEN_PATH names. A
token that a library prints into the log is replaced by stars.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmprune.service.environment import hub_variables

_FILE = "hub-token"
_HOME = "hub-home"


def keep_token(folder: Path, token: str) -> None:
    """Store a job's token in a file that only this user can ever read."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{_FILE}.partial"
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token)
    os.replace(partial, folder / _FILE)


def own_hub(folder: Path) -> dict[str, str]:
    """Return the environment variables by which a job uses its own token and a cache of its own."""
    return hub_variables(folder / _HOME) | {"HF_TOKEN_PATH": str(folder / _FILE)}


def has_token(folder: Path) -> bool:
    """Return whether a job has a token of its own."""
    return (folder / _FILE).is_file()


def drop_token(folder: Path, log: Path) -> None:
    """Delete what was pulled with the token, replace the token in the log by stars, then delete it."""
    path = folder / _FILE
    shutil.rmtree(folder / _HOME, ignore_errors=True)  # the rest is deleted with the job
    if not path.is_file():
        return
    if log.is_file():
        text = log.read_bytes()
        clean = redact(text, folder)
        if clean != text:
            with log.open("r+b") as file:  # in place and of the same length, which works on a full disk too
                file.write(clean)
    path.unlink()


def redact(text: bytes, folder: Path) -> bytes:
    """Return a text with the job's token replaced by as many stars."""
    try:
        token = (folder / _FILE).read_bytes()
    except OSError:
        return text
    return text.replace(token, b"*" * len(token)) if token else text
