"""Base class of all result values, and the version of their JSON schema."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 4


class Figures(BaseModel):
    """Immutable value whose JSON has exactly its fields; infinity and NaN are written as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the value from a JSON file. Raises OSError, or pydantic's ValidationError for other content."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))
