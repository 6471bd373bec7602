"""The process of the supervisor.

    python -m llmprune.service.supervisor   (settings as one line of JSON on standard input)

A line on standard input wakes it, and the line ``stop`` ends it together with its jobs. When the input closes, the
service has died: this process ends, its jobs run on, and the next supervisor finds them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llmprune.service.database.database import DatabaseUnavailable
from llmprune.service.database.open_database import open_database
from llmprune.service.jobs.store import JobStore
from llmprune.service.logs import log_with_time
from llmprune.service.monitoring.sampler import Sampler
from llmprune.service.notifications.deliverer import Deliverer
from llmprune.service.ongoing_fault import OngoingFault
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers import remote_launchers
from llmprune.service.supervisor.supervisor import Supervisor

logger = logging.getLogger(__name__)

ROUND_EVERY = 0.5  # seconds


def main() -> None:
    """Supervise jobs until standard input says stop or closes."""
    log_with_time()
    settings = Settings.model_validate_json(_first_line(sys.stdin.fileno()))
    with (settings.data_dir / "supervisor.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the previous supervisor may still be ending
        supervise(settings)


def supervise(settings: Settings) -> None:
    """Run round after round until standard input says stop or closes."""
    supervisor = Supervisor(settings)
    with _background(settings):
        _rounds(supervisor)


@contextmanager
def _background(settings: Settings) -> Iterator[None]:
    """Send notifications and sample the use of the machine in threads, because both may wait for others."""
    stop = threading.Event()
    sampler = Sampler(settings, JobStore(open_database(settings)), remote_launchers=remote_launchers(settings))
    for work in (Deliverer(settings).run, sampler.run):
        threading.Thread(target=work, args=(stop,), daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _rounds(supervisor: Supervisor) -> None:
    """Run round after round until standard input says stop or closes."""
    fault = OngoingFault(logger, "the job table cannot be used")
    while True:
        attempt_round(supervisor, fault)
        if select.select([sys.stdin], [], [], ROUND_EVERY)[0]:
            command = os.read(sys.stdin.fileno(), 4096)
            if b"stop" in command:
                return _stop(supervisor)
            if not command:
                return None


def attempt_round(supervisor: Supervisor, fault: OngoingFault) -> None:
    """Run a round. Nothing is lost where the job table cannot be used: the next round tries again."""
    try:
        supervisor.round()
    except (DatabaseUnavailable, OSError) as error:
        fault.occurred(str(error.reason if isinstance(error, DatabaseUnavailable) else error), time.monotonic())
    else:
        fault.passed(time.monotonic())


def _stop(supervisor: Supervisor) -> None:
    """End the jobs. Without the database they are not known: they run on, and the next service finds them."""
    try:
        supervisor.stop()
    except DatabaseUnavailable as error:
        logger.warning("jobs run on, because the job table cannot be used (%s)", error.reason)


def _first_line(descriptor: int) -> bytes:
    """Read one line and no byte more, because ``select`` does not see what Python has buffered."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


if __name__ == "__main__":
    main()
