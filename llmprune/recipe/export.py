"""The recipe's ``export`` section: the files of the result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmprune.common.schema import Section, Size


class Export(Section):
    """Settings of the checkpoint's files."""

    prediction_heads: Literal["keep", "drop"] = Field(
        "keep",
        description="Heads that predict further tokens (MTP): kept where their layer follows the cut and transformers "
        "still reloads the result without a complaint; drop: always left out.",
    )
    max_shard_size: Size = Field(5_000_000_000, description="Maximum size of one weights file, such as 5GB.")
