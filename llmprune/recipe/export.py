"""The recipe's ``export`` section: how the result is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmprune.common.schema import Section, Size

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]


class Export(Section):
    """How the result is written."""

    max_shard_size: Size = Field(5_000_000_000, description="Most bytes in one weights file, such as 5GB.")
