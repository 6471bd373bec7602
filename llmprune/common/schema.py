"""What every section of a recipe has in common: strict, frozen, and quick to import."""

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
    """A part of the recipe. Unknown keys and wrong types are errors; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def parse_size(value: Any) -> int:
    """Bytes from ``5GB``, ``20GiB`` or a plain number."""
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
    """``3.1 GB``: decimal units, as disks and the hub print them."""
    return format_scaled(size, ("B", "KB", "MB", "GB", "TB", "PB", "EB"))


def format_count(count: float) -> str:
    """``16.6 B`` parameters, ``134.5 M``, ``1,024``."""
    if round(abs(count)) < 1_000_000:
        return f"{count:,.0f}"
    return format_scaled(count / 1e6, ("M", "B", "T"), digits=4)


def format_scaled(value: float, units: Sequence[str], *, digits: int = 3) -> str:
    """Write a value in the first unit that needs less than 1,000 of it, each unit 1,000 of the one before."""
    for unit in units[:-1]:
        if abs(float(f"{value:.{digits}g}")) < 1000:  # as written: 999.6 with three digits is 1,000
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
        said = " and ".join(given) or "none"
        raise ValueError(f"needs exactly one of {', '.join(names)}; {said} given{remedy}")
