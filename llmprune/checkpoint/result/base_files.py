"""Plan how a base model's own files enter the result, before anything but its config is downloaded."""

from __future__ import annotations

from llmprune.anatomy.meta_model import Config
from llmprune.checkpoint.copied_files import FileSelection, select_by_name, select_files
from llmprune.checkpoint.download import file_sizes
from llmprune.checkpoint.location import conversion_of, folder_of, is_on_hub
from llmprune.checkpoint.result.config_file import ConfigChange, edited_config
from llmprune.recipe.model import ModelSource


def planned_files(source: ModelSource) -> FileSelection:
    """Judge the files of a model's folder; for a hub model, those that its commit lists.

    Raises ModelError for a file that is to be copied and cannot be read.
    """
    if conversion_of(source) is None and is_on_hub(source):
        return select_by_name(file_sizes(source.id, source.revision), source.trust_remote_code)
    return select_files(folder_of(source, "config"), source.trust_remote_code)


def require_expressible(source: ModelSource, before: Config, *, after: Config, layers: tuple[int, ...]) -> None:
    """Raise ModelError where the base's config file cannot be edited to express the cut."""
    edited_config(ConfigChange(folder_of(source, "config"), before, after, layers, source.trust_remote_code))
