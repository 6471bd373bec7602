"""Errors of one job or one duty of the supervisor, kept from the others.

An error that may pass, such as a full disk, is logged once and the work is tried again in the next round. After any
other error the job cannot be gone on with. What concerns the whole job table is raised.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable

logger = logging.getLogger(__name__)

# The folder of the job is gone or closed, which does not pass; a full disk and too many open files do.
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)


class Isolation:
    """Runs pieces of work, and logs each kind of error once until the piece succeeds."""

    def __init__(self) -> None:
        self._logged: dict[str, str] = {}

    def attempt(self, what: str, work: Callable[[], object]) -> Exception | None:
        """Do a piece of work. Return its error where trying again is of no use, else None.

        Raises sqlite3.OperationalError, for then the table itself cannot be used.
        """
        try:
            work()
        except sqlite3.OperationalError:
            raise
        except Exception as error:  # whatever a damaged row, file or answer leads to
            self._log_once(what, error)
            passes = isinstance(error, OSError) and not isinstance(error, _LASTING)
            return None if passes else error
        self._logged.pop(what, None)
        return None

    def _log_once(self, what: str, error: Exception) -> None:
        said = f"{type(error).__name__}: {error}"
        if self._logged.get(what) != said:
            self._logged[what] = said
            logger.error("%s: %s", what, said, exc_info=error)
