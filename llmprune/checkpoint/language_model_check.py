"""Refuse a checkpoint that is no plain language model, before its weights are read."""

from __future__ import annotations

from pathlib import Path

from llmprune.checkpoint.checkpoint_kind import names_in, problems_of_kind
from llmprune.checkpoint.download import names_of
from llmprune.checkpoint.location import folder_of
from llmprune.checkpoint.weight_headers import Headers, read_config
from llmprune.common.errors import ModelError
from llmprune.recipe.model import ModelSource
from llmprune.recipe.text_source import PACKAGE_SCHEME


def require_language_model(source: ModelSource, found: Headers | None) -> None:
    """Raise ModelError for a checkpoint that is no plain language model.

    ``found``: headers of its weights files, None where they are not available.
    """
    if source.id.startswith(PACKAGE_SCHEME):
        return
    folder, names = folder_of(source, "config"), _file_names(source)
    problems = problems_of_kind(names, read_config(folder), headers=found, shown=source.id, pickles=source.pickles)
    if problems:
        raise ModelError("; also: ".join(problems))


def _file_names(source: ModelSource) -> list[str]:
    """Return the names of the files of a folder, two levels deep, or of a hub model."""
    folder = Path(source.id).expanduser()
    return names_in(folder) if folder.is_dir() else names_of(source.id, source.revision)
