"""Check that llmprune can write the GGUF files of a recipe, before the work begins."""

from __future__ import annotations

from pathlib import Path

from llmprune.checkpoint.llama_cpp.tools import LlamaCpp
from llmprune.checkpoint.llama_cpp.write_gguf import refused_vocabulary
from llmprune.common.errors import RecipeError
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
