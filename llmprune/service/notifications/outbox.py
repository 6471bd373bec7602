"""Outbox: notifications that are to be sent. They are written in the transaction that ends the job.

Each is sent at least once. A receiver recognises one that comes again by its id. After a day without success it is
given up, which the job's page says.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmprune.service.database.database import Database, Row, Transaction
from llmprune.service.notifications.cipher import KeyLost, TargetCipher
from llmprune.service.notifications.targets import Kind, StoredTarget, Target
from llmprune.service.notifications.values import Delivery

GIVE_UP_AFTER = 24 * 3600.0  # seconds
_KEEP = 30 * 86_400.0  # seconds that an ended delivery is listed
_PAUSES = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200)  # seconds after each failed try; the last one repeats
_MOST_PENDING = 2_000  # of one owner
_MOST_MAILS, _MAILS_PER = 60, 3600.0  # of one owner, in so many seconds
_FIELDS = (
    "id", "name", "owner", "model", "state", "exit_code", "error", "attempts", "ran_seconds", "source",
    "created", "started", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Pending:
    """A notification that is due."""

    id: str
    owner: str
    account: str  # of the owner when it was written
    target: StoredTarget
    body: Mapping[str, Any]
    tries: int
    created: float


@dataclass(frozen=True)
class SavedTargets:
    """Targets that are saved. ``unreadable``: number of those whose key was lost."""

    targets: tuple[Target, ...]
    unreadable: int = 0

    def masked(self, kind: Kind) -> list[str]:
        """Return the targets of a kind for forms: URLs without paths, addresses without most of the name."""
        return [target.masked for target in self.targets if target.kind == kind]


class Outbox:
    """Targets of jobs, defaults of users, and the notifications to send."""

    def __init__(self, database: Database, cipher: TargetCipher) -> None:
        self.database, self.cipher = database, cipher

    def targets(self, job: str) -> SavedTargets:
        """Return the targets of a job."""
        rows = self.database.read("SELECT kind, target FROM notify_targets WHERE job = ?", (job,))
        return self._saved(_stored(rows))

    def set_targets(self, job: str, targets: Iterable[Target]) -> None:
        """Replace the targets of a job."""
        with self.database.write() as connection:
            connection.execute("DELETE FROM notify_targets WHERE job = ?", (job,))
            write_targets(connection, job, targets=map(self.cipher.encrypt, targets))

    def defaults(self, owner: str) -> SavedTargets:
        """Return the targets of new jobs of a user that name none."""
        return self._saved(self._stored_defaults(owner))

    def set_defaults(self, owner: str, targets: Iterable[Target]) -> None:
        """Replace the defaults of a user."""
        with self.database.write() as connection:
            connection.execute("DELETE FROM notify_defaults WHERE owner = ?", (owner,))
            for target in map(self.cipher.encrypt, targets):
                connection.execute("INSERT INTO notify_defaults VALUES (?, ?, ?)", (owner, target.kind, target.text))

    def send_test(self, owner: str) -> int:
        """Queue a test to the defaults of a user; return their number."""
        targets = self._stored_defaults(owner)
        with self.database.write() as connection:
            _enqueue(connection, targets, owner=owner, job=None, body={"type": "test", "data": {"owner": owner}})
        return len(targets)

    def deliveries(self, job: str) -> list[Delivery]:
        """Return the deliveries of a job, the newest first."""
        sql = "SELECT * FROM outbox WHERE job = ? ORDER BY created DESC, id LIMIT 50"
        return [self._shown(row) for row in self.database.read(sql, (job,))]

    def tests(self, owner: str) -> list[Delivery]:
        """Return the last tests of a user, the newest first."""
        sql = "SELECT * FROM outbox WHERE job IS NULL AND owner = ? ORDER BY created DESC, id LIMIT 5"
        return [self._shown(row) for row in self.database.read(sql, (owner,))]

    def due(self, now: float, *, limit: int) -> list[Pending]:
        """Return notifications that are due, at most two of one owner."""
        longest = float(_PAUSES[-1])
        # a row that is due later than after the longest pause: the clock was set back
        sql = "SELECT * FROM outbox WHERE state = 'pending' AND (due <= ? OR due > ?) ORDER BY due LIMIT 500"
        chosen: list[Pending] = []
        by_owner: dict[str, int] = {}
        for row in self.database.read(sql, (now, now + longest)):
            if by_owner.get(row["owner"], 0) >= 2 or len(chosen) >= limit:
                continue
            if row["kind"] == "email" and self._mails_of(row["owner"], now) >= _MOST_MAILS:
                continue
            by_owner[row["owner"]] = by_owner.get(row["owner"], 0) + 1
            target = StoredTarget(row["kind"], row["target"])
            body = json.loads(row["body"])
            owner, account = row["owner"], row["account"]
            chosen.append(Pending(row["id"], owner, account, target, body, row["tries"], row["created"]))
        return chosen

    def begin(self, pending: Pending) -> None:
        """Count a try before it is made, and delay the next one."""
        with self.database.write() as connection:
            connection.execute(
                "UPDATE outbox SET tries = ?, due = ? WHERE id = ?",
                (pending.tries + 1, time.time() + _pause(pending), pending.id),
            )

    def delivered(self, pending: Pending) -> None:
        """Record that a notification has arrived."""
        self._write(pending, state="delivered", error=None, now=time.time())

    def failed(self, pending: Pending, error: str, *, permanent: bool = False) -> bool:
        """Record a failed try; return whether the notification was given up."""
        now = time.time()
        given_up = permanent or now - pending.created >= GIVE_UP_AFTER
        self._write(pending, state="given up" if given_up else "pending", error=error[:500], now=now)
        return given_up

    def forget_old(self, now: float) -> None:
        """Delete deliveries that ended long ago."""
        with self.database.write() as connection:
            connection.execute("DELETE FROM outbox WHERE state <> 'pending' AND ended < ?", (now - _KEEP,))

    def _stored_defaults(self, owner: str) -> list[StoredTarget]:
        return _stored(self.database.read("SELECT kind, target FROM notify_defaults WHERE owner = ?", (owner,)))

    def _saved(self, stored: Sequence[StoredTarget]) -> SavedTargets:
        found: list[Target] = []
        for one in stored:
            with suppress(KeyLost):
                found.append(self.cipher.decrypt(one))
        return SavedTargets(tuple(sorted(found)), unreadable=len(stored) - len(found))

    def _shown(self, row: Row) -> Delivery:
        values = {name: row[name] for name in Delivery.model_fields}
        return Delivery(**values | {"target": self.cipher.shown(StoredTarget(row["kind"], row["target"]))})

    def _mails_of(self, owner: str, now: float) -> int:
        sql = (
            "SELECT count(*) AS n FROM outbox WHERE owner = ? AND state = 'delivered' AND ended > ? AND kind = 'email'"
        )
        return int(self.database.read(sql, (owner, now - _MAILS_PER))[0]["n"])

    def _write(self, pending: Pending, *, state: str, error: str | None, now: float) -> None:
        ended = None if state == "pending" else now
        with self.database.write() as connection:
            connection.execute(
                "UPDATE outbox SET state = ?, tries = ?, error = ?, due = ?, ended = ? WHERE id = ?",
                (state, pending.tries + 1, error, now + _pause(pending), ended, pending.id),
            )


def _pause(pending: Pending) -> int:
    """Return the seconds between the next try and the one after it."""
    return _PAUSES[min(pending.tries, len(_PAUSES) - 1)]


def write_targets(connection: Transaction, job: str, *, targets: Iterable[StoredTarget]) -> None:
    """Write the targets of a job."""
    for target in targets:
        connection.execute("INSERT INTO notify_targets VALUES (?, ?, ?)", (job, target.kind, target.text))


def write_default_targets(connection: Transaction, job: str, *, owner: str) -> None:
    """Give a new job the targets that its owner has set for jobs that name none."""
    connection.execute(
        "INSERT INTO notify_targets SELECT ?, kind, target FROM notify_defaults WHERE owner = ?", (job, owner)
    )


def notify_end(connection: Transaction, row: Mapping[str, Any] | Row) -> None:
    """Queue the notifications of a job that has just ended; ``row``: of the job table, after the end."""
    rows = connection.execute("SELECT kind, target FROM notify_targets WHERE job = ?", (row["id"],)).fetchall()
    if not rows:
        return
    data = {name: row[name] for name in _FIELDS}
    try:
        data["figures"] = json.loads(row["figures"]) if row["figures"] else None
    except (ValueError, TypeError):
        data["figures"] = None
    _enqueue(connection, _stored(rows), owner=row["owner"], job=row["id"], body={"type": "job.ended", "data": data})


def _enqueue(
    connection: Transaction, targets: Sequence[StoredTarget], *, owner: str, job: str | None, body: Mapping[str, Any]
) -> None:
    now = time.time()
    sql = "SELECT count(*) AS n FROM outbox WHERE owner = ? AND state = 'pending'"
    waiting = connection.execute(sql, (owner,)).fetchone()["n"]
    for number, target in enumerate(targets):
        is_full = waiting + number >= _MOST_PENDING
        error = f"{_MOST_PENDING:,} notifications of this user wait already" if is_full else None
        connection.execute(
            "INSERT INTO outbox (id, job, owner, account, kind, target, body, state, error, created, due, ended) "
            "VALUES (?, ?, ?, coalesce((SELECT account FROM users WHERE name = ?), ''), ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                f"msg_{secrets.token_hex(12)}", job, owner, owner, target.kind, target.text, json.dumps(body),
                "given up" if is_full else "pending", error, now, now, now if is_full else None,
            ),
        )  # fmt: skip


def _stored(rows: Iterable[Row]) -> list[StoredTarget]:
    return [StoredTarget(row["kind"], row["target"]) for row in rows]
