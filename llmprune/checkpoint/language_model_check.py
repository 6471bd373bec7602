"""Refuse a checkpoint that is no plain language model, before its weights are read."""

from __future__ import annotations

from llmprune.checkpoint.checkpoint_kind import names_in, problems_of_kind
from llmprune.checkpoint.download import names_of
from llmprune.checkpoint.location import conversion_of, folder_of, is_on_hub
from llmprune.checkpoint.weight_headers import Headers, read_config
from llmprune.common.errors import ModelError
from llmprune.recipe.model import ModelSource


def require_language_model(source: ModelSource, found: Headers | None) -> None:
    """Raise ModelError for a checkpoint that is no plain language model.

    ``found``: headers of its weights files, None where they are not available.
    """
    folder, names = folder_of(source, "config"), _file_names(source)
    problems = problems_of_kind(names, read_config(folder), headers=found, shown=source.id, pickles=source.pickles)
    if problems:
        raise ModelError("; also: ".join(problems))


def _file_names(source: ModelSource) -> list[str]:
    """Return the names of the files of a folder, two levels deep, or of a hub model."""
    if conversion_of(source) is None and is_on_hub(source):
        return names_of(source.id, source.revision)
    return names_in(folder_of(source, "config"))
