"""Base class of all result values, and the version of their JSON schema."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 4


class Figures(BaseModel):
    """Immutable value whose JSON has exactly its fields; infinity and NaN are written as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")
