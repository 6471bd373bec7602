"""Deliverer of the outbox: a thread of the supervisor, of which only one at a time works on a data folder."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from llmprune.service.api.access.server_paths import ServerPaths
from llmprune.service.database.database import DatabaseError
from llmprune.service.database.open_database import open_database
from llmprune.service.notifications.cipher import KeyLost, TargetCipher
from llmprune.service.notifications.key_file import secret_of
from llmprune.service.notifications.mail import send_mail
from llmprune.service.notifications.outbox import Outbox, Pending
from llmprune.service.notifications.webhook import DeliveryError, post, signed_headers
from llmprune.service.ongoing_fault import OngoingFault
from llmprune.service.settings import Settings

logger = logging.getLogger(__name__)

_ROUND_EVERY = 1.0  # seconds
_AT_A_TIME = 8
_FORGET_EVERY = 3600.0  # seconds


class Deliverer:
    """Sends what is due in the outbox of a service."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.outbox = Outbox(open_database(settings), TargetCipher(settings.data_dir))
        self._paths = ServerPaths.of(settings)
        self._forgot = float("-inf")

    def run(self, stop: threading.Event) -> None:
        """Send until ``stop`` is set."""
        with ThreadPoolExecutor(_AT_A_TIME, "notification") as senders:
            fault = OngoingFault(logger, "the outbox cannot be used")
            while not stop.wait(_ROUND_EVERY):
                try:
                    self.round(senders)
                except (OSError, DatabaseError) as error:  # nothing is lost: the next round tries again
                    fault.occurred(str(error), time.monotonic())
                else:
                    fault.passed(time.monotonic())

    def round(self, senders: ThreadPoolExecutor) -> int:
        """Send the notifications that are due; return their number."""
        if time.monotonic() - self._forgot > _FORGET_EVERY:
            self._forgot = time.monotonic()
            self.outbox.forget_old(time.time())
        due = self.outbox.due(time.time(), limit=_AT_A_TIME)
        list(senders.map(self._send, due))
        return len(due)

    def _send(self, pending: Pending) -> None:
        self.outbox.begin(pending)  # while the outbox cannot be written, a try would be repeated every second
        try:
            self._deliver(pending)
        except DeliveryError as error:
            reason = self._paths.hide(str(error))
            given_up = self.outbox.failed(pending, reason, permanent=error.permanent)
            end = "given up" if given_up else "trying again later"
            shown = self.outbox.cipher.shown(pending.target)
            logger.warning("a notification to %s failed (%s); %s", shown, reason, end)
        else:
            self.outbox.delivered(pending)

    def _deliver(self, pending: Pending) -> None:
        """Send one notification. Raises DeliveryError."""
        settings, body = self.settings.notifications, self._shown(pending)
        try:
            target = self.outbox.cipher.decrypt(pending.target)
        except KeyLost as error:
            raise DeliveryError(str(error), permanent=True) from error
        if target.kind == "email":
            return send_mail(target.target, pending.id, body=body, settings=settings)
        content = json.dumps(body).encode()
        secret = secret_of(self.settings.data_dir, pending.owner, account=pending.account)
        headers = signed_headers(pending.id, content, secret=secret, now=int(time.time()))
        return post(target.target, content, headers=headers, settings=settings)

    def _shown(self, pending: Pending) -> dict[str, Any]:
        """Return the body as it is sent: the same at every try, without paths of the server, with a link to the job."""
        body: dict[str, Any] = self._paths.hide_in(dict(pending.body))
        data = body["data"]
        if data.get("id"):
            data["url"] = self.settings.notifications.link_to(data["id"])
        when = datetime.fromtimestamp(pending.created, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"type": body["type"], "timestamp": when, "data": data}
