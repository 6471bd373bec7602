"""Table of text, which the terminal, pages and model cards each draw in their own way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextTable:
    """Heads of the columns, and the rows, each with its name first."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
