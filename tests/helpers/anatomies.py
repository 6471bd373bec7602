"""Anatomies of saved models, each discovered once: that takes longer than most steps on a tiny model."""

from __future__ import annotations

from functools import cache

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.loading import load_config
from llmprune.layerwise.decoder import Decoder
from llmprune.recipe.model import ModelSource


def anatomy_of(decoder: Decoder) -> Anatomy:
    """Return the anatomy of the model whose folder a decoder was opened from."""
    return _discovered(decoder.skeleton.config.name_or_path)


@cache
def _discovered(folder: str) -> Anatomy:
    return discover(load_config(ModelSource(id=folder)))
