"""Text from elsewhere, made safe to print.

Names, error messages, file names and log lines can come from other people: from a hub repository, a data set, a
recipe or a service. Printed raw, an escape sequence in them moves the cursor, sets the clipboard or hides a link,
and a direction mark reorders the rest of the line. Here they become visible escapes such as ``\\x1b`` and ``\\u202e``.
"""

from __future__ import annotations

import logging
import unicodedata
from types import TracebackType

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

"".encode("unicode_escape")  # loads the codec, which opens files: later there may be none left to open
_ESCAPED = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # control, format, unassigned, private, surrogate, separators


def printable(text: str, newlines: bool = False) -> str:
    """The text with an escape for each character that prints nothing of its own, spaces excepted.

    ``newlines``: keep line feeds, for text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(char if newlines and char == "\n" else _visible(char) for char in text)


def printable_message(message: str) -> str:
    """An error message made printable. Only the line breaks of its list of problems stay."""
    return "\n  - ".join(printable(part) for part in message.split("\n  - "))


def _visible(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) not in _ESCAPED:
        return char
    return char.encode("unicode_escape").decode("ascii")  # also of a lone surrogate, which no encoding has


class LineFormatter(logging.Formatter):
    """Writes a record's message as one line, and makes a traceback below it safe to print."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """Return the record's line without the traceback."""
        return printable(super().formatMessage(record))

    def formatException(  # noqa: N802  # logging's own name
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """Return the traceback, whose lines stay lines."""
        return printable(super().formatException(ei), newlines=True)


def print_lines(logger: logging.Logger) -> None:
    """Have a logger's handlers write each record as one line."""
    for handler in logger.handlers:
        handler.setFormatter(LineFormatter(LOG_FORMAT))
