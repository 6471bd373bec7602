"""Encryption of the targets of notifications in the database, because backups of it travel.

URLs of webhooks often carry a token, and e-mail addresses are those of persons.
"""

from __future__ import annotations

import logging
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from llmprune.service.database.database import Database
from llmprune.service.notifications.key_file import KEY, OLD_KEY, encryption_keys
from llmprune.service.notifications.targets import StoredTarget, Target

logger = logging.getLogger(__name__)

_PREFIX = "fernet:"  # of an encrypted text
_TABLES = ("notify_targets", "notify_defaults", "outbox")
LOST = f"it cannot be read, because the service's file {KEY} was lost or replaced; save it again"


class KeyLost(Exception):
    """A target was encrypted with a key that is not there any more."""


class TargetCipher:
    """Encrypts and decrypts the targets of a service."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    def encrypt(self, target: Target) -> StoredTarget:
        """Return a target as the database has it."""
        return StoredTarget(target.kind, self._encrypted(target.target))

    def decrypt(self, stored: StoredTarget) -> Target:
        """Return a target of the database. Raises KeyLost."""
        try:
            token = stored.text.removeprefix(_PREFIX)
            return Target(stored.kind, self._fernet().decrypt(token.encode()).decode())
        except InvalidToken as error:
            raise KeyLost(LOST) from error

    def shown(self, stored: StoredTarget) -> str:
        """Return a target of the database for logs and lists."""
        try:
            return self.decrypt(stored).shown
        except KeyLost:
            return "a webhook" if stored.kind == "webhook" else "an address"

    def with_newest_key(self, text: str) -> str:
        """Return a target's text in the database, encrypted with the newest key where it can be read."""
        if not text.startswith(_PREFIX):
            return self._encrypted(text)
        try:
            return _PREFIX + self._fernet().rotate(text.removeprefix(_PREFIX)).decode()
        except InvalidToken:
            return text

    def _encrypted(self, text: str) -> str:
        return _PREFIX + self._fernet().encrypt(text.encode()).decode()

    def _fernet(self) -> MultiFernet:
        return MultiFernet([Fernet(key) for key in encryption_keys(self.data_dir)])


def encrypt_targets(database: Database, cipher: TargetCipher) -> None:
    """Encrypt the targets of an earlier version, and after a change of the key those with the key before.

    The key before is deleted when it is not needed any more.
    """
    old = cipher.data_dir / OLD_KEY
    every = "" if old.exists() else f"WHERE target NOT LIKE '{_PREFIX}%'"
    changed = False
    for table in _TABLES:
        texts = [row["target"] for row in database.read(f"SELECT DISTINCT target FROM {table} {every}")]
        changes = [(now, text) for text in texts if (now := cipher.with_newest_key(text)) != text]
        changed = changed or bool(changes)
        if changes:
            with database.write() as connection:
                connection.executemany(f"UPDATE {table} SET target = ? WHERE target = ?", changes)
    if changed:
        database.rewrite(_TABLES)  # otherwise the text before is still in its file
    old.unlink(missing_ok=True)
    _warn_where_lost(database, cipher)


def _warn_where_lost(database: Database, cipher: TargetCipher) -> None:
    """Log a warning where a table has a target that cannot be read."""
    for table in _TABLES:
        rows = database.read(f"SELECT kind, target FROM {table} LIMIT 1")
        for row in rows:
            try:
                cipher.decrypt(StoredTarget(row["kind"], row["target"]))
            except KeyLost:
                place = cipher.data_dir / KEY
                logger.warning("saved notification targets cannot be read: %s is not the key of this job table", place)
                return
