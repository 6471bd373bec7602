"""Values that the client makes of answers whose own types need torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmprune.results.figures.model_size import Size


class PlannedRun(BaseModel):
    """Plan of a recipe, as the service answers it."""

    model_config = ConfigDict(frozen=True)

    model: str
    model_type: str
    dtype: str
    dense: Size
    pruned: Size
    parameters_exact: bool = Field(description="False where the scores choose among layers of different size.")
    removed_layers: tuple[int, ...] | None = Field(description="None where the scores choose them.")
    keep_layers: int
    keep_widths: dict[str, int] = Field({}, description="Neurons of each MLP, by the config field that sets them.")
    calibration: tuple[int, int] = Field(description="Windows, and tokens in each.")
    memory: dict[str, int] = Field({}, description="Estimated peak in bytes, by its parts.")
    disk: int = Field(description="Bytes of the result.")
    notes: tuple[str, ...] = ()
    whole: dict[str, Any] = Field({}, description="The whole plan, as `llmprune plan --json` prints it.")
