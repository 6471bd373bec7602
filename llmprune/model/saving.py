from __future__ import annotations
from pydantic import Field
from llmprune.schema import Section, Size
class Export(Section):
    """How the result is written."""

    max_shard_size: Size = Field(5_000_000_000, description="Most bytes in one weights file, such as 5GB.")
