"""Isolation of errors: a failure of one job or of one duty of the supervisor does not affect the others.

A temporary error, such as a full disk, is logged once and the work is tried again in the next round. Any other error
means that the job cannot continue. An error of the job table itself is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from llmprune.service.database.database import DatabaseUnavailable

logger = logging.getLogger(__name__)

# The job's folder is missing or cannot be read. A full disk and too many open files are temporary.
_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)


class Isolation:
    """Runs pieces of work, and logs each error once until the piece succeeds."""

    def __init__(self) -> None:
        self._logged: dict[str, str] = {}

    def attempt(self, what: str, work: Callable[[], object]) -> Exception | None:
        """Do a piece of work. Return its error where a retry is of no use, else None.

        ``what`` names the work in the log. Raises DatabaseUnavailable, which concerns the whole job table.
        """
        try:
            work()
        except DatabaseUnavailable:
            raise
        except Exception as error:  # a damaged row, file or answer can raise anything
            self._log_once(what, error)
            is_temporary = isinstance(error, OSError) and not isinstance(error, _PERMANENT)
            return None if is_temporary else error
        self._logged.pop(what, None)
        return None

    def _log_once(self, what: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        if self._logged.get(what) != message:
            self._logged[what] = message
            logger.error("%s: %s", what, message, exc_info=error)
