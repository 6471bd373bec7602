"""Key of the service: a file in the data folder from which signing secrets and the encryption of targets are derived.

A file with the same name and ``.old`` behind it has the key before: what was encrypted with it can still be read.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

KEY = "webhook-key"
OLD_KEY = f"{KEY}.old"
SECRET_PREFIX = "whsec_"


def secret_of(data_dir: Path, owner: str, *, account: str) -> str:
    """Return the secret that signs the webhooks of a user, derived from the service's key.

    ``account``: tells the user apart from one who had the name before; empty for users of earlier versions.
    """
    name = f"{owner} {account}" if account else owner  # no name of a user has a space
    derived = hmac.digest(service_key(data_dir), f"webhook {name}".encode(), "sha256")
    return SECRET_PREFIX + base64.b64encode(derived).decode()


def encryption_keys(data_dir: Path) -> list[bytes]:
    """Return the keys that targets are encrypted with, in the form of Fernet: the current one, then the one before."""
    keys = [service_key(data_dir)]
    with suppress(FileNotFoundError):
        keys.append((data_dir / OLD_KEY).read_bytes())
    return [base64.urlsafe_b64encode(hmac.digest(key, b"targets", "sha256")) for key in keys]


def service_key(data_dir: Path) -> bytes:
    """Return the service's key, made at the first call; only this user can read its file."""
    path = data_dir / KEY
    if not path.exists():
        partial = data_dir / f".{KEY}.{secrets.token_hex(4)}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was first
            os.link(partial, path)
        partial.unlink()
    return path.read_bytes()
