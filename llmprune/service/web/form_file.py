"""A multipart form as a stream: fields, then one file, which is never in memory as a whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from llmprune.service.api.error_responses import Refused

KIND = "multipart/form-data"
_MAX_FIELDS, _MAX_BYTES = 10, 64 * 1024  # fields before the file, and their bytes in all


class FormFile:
    """The file of a form, to be read like an open file once ``read_fields`` has returned what comes before it.

    ``name``: of the file on the sender's machine; None before it begins. ``pull`` returns further bytes of the body,
    none at its end.
    """

    def __init__(self, content_type: str, pull: Callable[[], bytes]) -> None:
        """Begin to read a body. Raises Refused (415)."""
        kind, options = parse_options_header(content_type)
        if kind != KIND.encode() or not options.get(b"boundary"):
            raise Refused(415, f"send the form as {KIND}")
        self.name: str | None = None
        self._pull = pull
        self._fields: dict[str, bytearray] = {}
        self._field: bytearray | None = None  # that arrives now; None: the file, or nothing
        self._header, self._value = bytearray(), bytearray()
        self._options: dict[bytes, bytes] = {}  # of the part's Content-Disposition
        self._file: deque[bytes] = deque()
        self._has_ended = False  # the file
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_part_end": self._end_part,
            },
        )

    def read_fields(self) -> Mapping[str, str]:
        """Return the fields before the file. Raises Refused (422) where there is no file."""
        while self.name is None:
            if not self._parse():
                raise Refused(422, "the form has no archive; choose a file")
        return {name: bytes(value).decode("utf-8", "replace") for name, value in self._fields.items()}

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes of the file, none at its end."""
        while not self._file and not self._has_ended:
            if not self._parse():
                raise Refused(422, "the form ends within the archive; send it again")
        if not self._file:
            return b""
        part = self._file.popleft()
        if len(part) > size:
            self._file.appendleft(part[size:])
        return part[:size]

    def _parse(self) -> bool:
        """Parse the next bytes of the body; return whether there were any."""
        part = self._pull()
        try:
            self._parser.write(part)
        except FormParserError as error:
            raise Refused(422, "the form cannot be read; send it again") from error
        return bool(part)

    def _begin_part(self) -> None:
        if self.name is not None:
            raise Refused(422, "the form has something behind its archive; send one archive, as the last of its fields")
        self._options = {}

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:  # noqa: PLR0917 - the parser's callback
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:  # noqa: PLR0917 - the parser's callback
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._options = parse_options_header(bytes(self._value))[1]
        self._header.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        if b"filename" in self._options:
            self.name = self._options[b"filename"].decode("utf-8", "replace")
        elif len(self._fields) >= _MAX_FIELDS:
            raise Refused(422, f"the form has more than {_MAX_FIELDS} fields")
        else:
            name = self._options.get(b"name", b"").decode("utf-8", "replace")
            self._field = self._fields.setdefault(name, bytearray())

    def _add_content(self, data: bytes, start: int, end: int) -> None:  # noqa: PLR0917 - the parser's callback
        if self._field is None:
            self._file.append(data[start:end])
            return
        self._field += data[start:end]
        if sum(map(len, self._fields.values())) > _MAX_BYTES:
            raise Refused(413, f"the form's text has more than {_MAX_BYTES:,} bytes; shorten its notes")

    def _end_part(self) -> None:
        self._has_ended = self._field is None
        self._field = None
