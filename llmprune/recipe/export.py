"""The recipe's ``export`` section: the files of the result."""

from __future__ import annotations

from pydantic import Field

from llmprune.common.schema import Section, Size


class Export(Section):
    """Settings of the checkpoint's files."""

    max_shard_size: Size = Field(5_000_000_000, description="Maximum size of one weights file, such as 5GB.")
