"""Check that llmprune can write a result in its base's quantized format, before the work begins."""

from __future__ import annotations

from llmprune.checkpoint.location import quantization_of_source
from llmprune.checkpoint.requantized import require_requantizable
from llmprune.recipe.model import ModelSource


def require_quantized(source: ModelSource) -> None:
    """Raise ModelError where the base is not quantized, or in a format that is not written here."""
    require_requantizable(quantization_of_source(source))
