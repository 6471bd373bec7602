"""The recipe's ``hidden`` section: how many channels of the residual stream are kept."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from llmprune.common.schema import Positive, Section


class Hidden(Section):
    """Channels of the residual stream to keep in the whole model: its hidden size."""

    keep: Positive | Annotated[float, Field(gt=0, le=1)] = Field(
        description="Residual channels kept: 2048 is a number, 0.9 a fraction, which is rounded to a number that the "
        "model's config accepts.",
    )
    multiple: Positive | None = Field(
        None,
        description="A fraction is rounded to a multiple of this; default: the largest power of two, up to 128, that "
        "some accepted number within 3 % of the dense size is a multiple of.",
    )


def number_or_settings(value: Any) -> Any:
    """Return the settings of the section for a number alone, such as ``hidden: 0.9``."""
    return {"keep": value} if isinstance(value, int | float) and not isinstance(value, bool) else value
