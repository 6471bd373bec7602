"""Base class of recipe sections, and sizes and counts as text. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}

Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Section of a recipe: frozen; unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def parse_size(value: Any) -> int:
    """Return the bytes of a size such as ``5GB``, ``20GiB`` or a plain number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?i?B?)\s*", str(value))
        if match is None or match[2] not in _UNITS:
            raise ValueError("a size is a number with a unit, such as 5GB or 20GiB")
        size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError("a size must be above zero, such as 5GB or 20GiB")
    return size


def format_size(size: float) -> str:
    """Format bytes in decimal units, as disks and the hub do: ``3.1 GB``."""
    return format_scaled(size, ("B", "KB", "MB", "GB", "TB", "PB", "EB"))


def format_count(count: float) -> str:
    """Format a count: ``16.6 B``, ``134.5 M``, ``1,024``."""
    if round(abs(count)) < 1_000_000:
        return f"{count:,.0f}"
    return format_scaled(count / 1e6, ("M", "B", "T"), digits=4)


def format_scaled(value: float, units: Sequence[str], *, digits: int = 3) -> str:
    """Format a value in the first unit in which it is below 1,000; each unit is 1,000 times the one before."""
    for unit in units[:-1]:
        if abs(float(f"{value:.{digits}g}")) < 1000:  # after rounding: 999.6 with three digits is 1,000
            return f"{value:.{digits}g} {unit}"
        value /= 1000
    written = f"{value:.{digits}g}"
    return f"{written if abs(float(written)) < 1000 else format(value, ',.0f')} {units[-1]}"


Size = Annotated[int, BeforeValidator(parse_size)]


def exactly_one(section: Section, names: Sequence[str]) -> None:
    """Raise ValueError unless exactly one of these fields of a section has a value."""
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        remedy = ": leave one out or set it to null" if given else ""
        named = " and ".join(given) or "none"
        raise ValueError(f"needs exactly one of {', '.join(names)}; {named} given{remedy}")
