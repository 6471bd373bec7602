"""Faults of text and data files: wrong encoding, binary content, a broken line; with place and remedy."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from llmprune.common.errors import CalibrationError

_HEAD = 65_536  # bytes that are checked before a file is read
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins like the mark of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_PARQUET = b"PAR1"
_PACKED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)  # the datasets library unpacks these
_TAR, _TAR_AT = b"ustar", 257  # signature of a tar file, and its offset
_PACKED_SUFFIXES = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".lz4": "unlz4"}
_LONGEST_MARK = max(map(len, _PACKED))
_KINDS: dict[type, str] = {
    list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"
}  # fmt: skip


def require_text_file(path: Path) -> None:
    """Raise CalibrationError where a file is missing, empty, or its first bytes contradict the suffix of its name."""
    if path.is_dir():
        raise CalibrationError(f"the data file {path} is a folder; give a file in it")
    if not path.is_file():
        remedy = "write the whole path in place of ~" if path.parts[:1] == ("~",) else "check the path"
        raise CalibrationError(f"the data file {path} does not exist (looked in {Path.cwd()}); {remedy}")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(max(0, path.stat().st_size - len(_PARQUET)))
            tail = file.read()
    except OSError as error:
        raise CalibrationError(
            f"the data file {path} cannot be read: {error.strerror}; check its permissions"
        ) from error
    if not head:
        raise CalibrationError(f"the data file {path} is empty; give one with text")
    fault = None
    if path.suffix == ".parquet":
        fault = _parquet_fault(head, tail)
    elif not _is_archive(head):  # the library's own reader reports its faults
        fault = foreign_encoding(head)
    if fault:
        raise CalibrationError(f"the data file {path} {fault}")


def _is_archive(head: bytes) -> bool:
    return head.startswith((*_PACKED, b"PK")) or head.startswith(_TAR, _TAR_AT)


def unread_kind(path: Path, kinds: str) -> str:
    """Return the message for a file of a kind that is not read. ``kinds``: those that are."""
    unpack = _PACKED_SUFFIXES.get(path.suffix)
    if unpack:
        return f"the data file {path} is compressed; unpack it first ({unpack} {path.name}), then name the file in it"
    return f"the data file {path} is of a kind that cannot be read; give one of {kinds}"


def fault_of(path: Path) -> str | None:
    """Read a text or JSON file and return its first fault as a sentence; None where there is none."""
    with path.open("rb") as file:
        packed = file.read(_LONGEST_MARK).startswith(_PACKED)
        file.seek(0)
        lines = enumerate(file, start=1)
        if packed:
            fault = None
        elif path.suffix == ".txt":
            fault = _undecodable(lines)
        else:
            fault = _faulty_value(path) if path.suffix == ".json" else _faulty_line(lines)
    return f"the data file {path}: {fault}" if fault else None


def foreign_encoding(data: bytes) -> str | None:
    """Return ``is UTF-16 text; …`` or ``is binary …``; None where byte-order mark and null bytes permit UTF-8."""
    found = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if found is None and b"\0" in data:
        even, odd = data[::2].count(0), data[1::2].count(0)
        if min(even, odd) * 10 < max(even, odd) and max(even, odd) * 4 > len(
            data
        ):  # the zero half of every ASCII character
            found = "UTF-16BE" if even > odd else "UTF-16LE"
        else:
            return f"is binary (a null byte at byte {data.index(0) + 1}), not text; give a file of text"
    return f"is {found} text; save it as UTF-8 (iconv -f {found} -t UTF-8 OLD > NEW)" if found else None


def utf8(data: bytes) -> str:
    """Decode UTF-8 verbatim. Raises ValueError with the fault, which begins with a verb."""
    fault = foreign_encoding(data) or undecodable_byte(data)
    if fault:
        raise ValueError(fault)
    return data.decode("utf-8")


def undecodable_byte(data: bytes) -> str | None:
    """Return the position of the first byte that is not UTF-8, with the remedy; None where there is none."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            f"is not UTF-8 at byte {error.start + 1} ({data[error.start]:#04x}); save it as UTF-8 "
            "(iconv -f LATIN1 -t UTF-8 OLD > NEW, if it is Latin-1)"
        )
    return None


def _undecodable(lines: Iterator[tuple[int, bytes]]) -> str | None:
    return next((f"line {number} {fault}" for number, line in lines if (fault := undecodable_byte(line))), None)


def _faulty_line(lines: Iterator[tuple[int, bytes]]) -> str | None:
    """Return the first fault of JSON lines, each of which must be an object; None where there is none."""
    fields = 0
    for number, line in lines:
        if not line.strip():
            continue
        fault = undecodable_byte(line)
        if fault:
            return f"line {number} {fault}"
        try:
            row = json.loads(line.decode("utf-8-sig").rstrip())
        except json.JSONDecodeError as error:
            return f"line {number}, column {error.colno}: not valid JSON ({error.msg}); correct or remove the line"
        except (ValueError, RecursionError):
            return f"line {number}: a number of too many digits or too many brackets; correct or remove the line"
        if not isinstance(row, dict):
            return f'line {number} is {_KINDS[type(row)]}; each line must be an object, such as {{"text": "…"}}'
        fields += len(row)
    return None if fields else 'it has no rows; give lines such as {"text": "…"}'


def _faulty_value(path: Path) -> str | None:
    """Return the fault of a JSON file, which holds one value or JSON lines; None where there is none."""
    data = path.read_bytes()
    try:
        json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # extra data: the file may hold JSON lines
            return f"line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); correct it there"
    except (ValueError, RecursionError):
        pass  # the check of single lines finds the place
    else:
        return None
    return _faulty_line(iter(enumerate(data.splitlines(), start=1)))


def _parquet_fault(head: bytes, tail: bytes) -> str | None:
    if not head.startswith(_PARQUET):
        return "is no Parquet file in spite of its name; give a Parquet file, or correct the suffix"
    if tail != _PARQUET:
        return "is a truncated Parquet file; copy it again"
    return None
