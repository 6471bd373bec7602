"""Escaping of untrusted text before it is printed.

Names, error messages, file names and log lines may come from a hub repository, a data set, a recipe or a service.
An escape sequence in them can move the cursor, set the clipboard or hide a link, and a direction mark reorders the
rest of the line. Such characters become visible escapes such as ``\\x1b`` and ``\\u202e``.
"""

from __future__ import annotations

import logging
import unicodedata
from types import TracebackType

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

"".encode("unicode_escape")  # loads the codec now: it opens files, and later no file descriptor may be free
_ESCAPED = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # control, format, unassigned, private, surrogate, separators


def printable(text: str, newlines: bool = False) -> str:
    """Return the text with an escape for each unprintable character. ``newlines``: keep line feeds."""
    if text.isprintable():
        return text
    return "".join(char if newlines and char == "\n" else _visible(char) for char in text)


def printable_message(message: str) -> str:
    """Return an error message made printable, in which only the line breaks of its list of problems are kept."""
    return "\n  - ".join(printable(part) for part in message.split("\n  - "))


def _visible(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) not in _ESCAPED:
        return char
    return char.encode("unicode_escape").decode("ascii")  # works for lone surrogates too


class LineFormatter(logging.Formatter):
    """Formats a record as one printable line, followed by a printable traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """Return the line of a record, without its traceback."""
        return printable(super().formatMessage(record))

    def formatException(  # noqa: N802  # logging's own name
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """Return the traceback with its line breaks."""
        return printable(super().formatException(ei), newlines=True)


def print_lines(logger: logging.Logger) -> None:
    """Set a formatter of one line per record for all handlers of a logger."""
    for handler in logger.handlers:
        handler.setFormatter(LineFormatter(LOG_FORMAT))
