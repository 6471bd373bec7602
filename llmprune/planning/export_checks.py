"""Checks that llmprune can write what a recipe's ``export`` asks for, before the work begins."""

from __future__ import annotations

from pathlib import Path

from llmprune.checkpoint.llama_cpp.tools import LlamaCpp
from llmprune.checkpoint.llama_cpp.write_gguf import refused_vocabulary
from llmprune.checkpoint.location import quantization_of_source
from llmprune.checkpoint.result.requantized import require_requantizable
from llmprune.common.errors import RecipeError
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe


def require_gguf(recipe: Recipe) -> None:
    """Raise RecipeError where llama.cpp's tools are not installed, or refuse the base model's config or tokenizer.

    Of a hub model a plan has no tokenizer: that is judged when the files are written.
    """
    tools = LlamaCpp.find()
    tools.require(recipe.export.gguf)
    folder = Path(recipe.model.id).expanduser()
    if folder.is_dir() and (reason := refused_vocabulary(tools, folder)):
        raise RecipeError(f"export.gguf: {reason}; take gguf out of export, or install a newer llama.cpp")


def require_quantized(source: ModelSource) -> None:
    """Raise ModelError where the base is not quantized, or in a format that is not written here."""
    require_requantizable(quantization_of_source(source))
