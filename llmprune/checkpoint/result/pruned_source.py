"""The saved checkpoint as a model source, placed as its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llmprune.anatomy.meta_model import build_meta_model, find_layers
from llmprune.checkpoint.loading import load_config
from llmprune.recipe.model import ModelSource


def pruned_source(base: ModelSource, folder: Path, *, layers: Sequence[int]) -> ModelSource:
    """Return the checkpoint in ``folder`` as a model source with the loading options of its base.

    ``layers``: indices of its layers in the base, by which a device map that names layers is translated.
    """
    pruned = base.at(str(folder.absolute()))
    if not isinstance(base.device_map, dict):
        return pruned
    meta_model = build_meta_model(load_config(base), torch.float32, trust_remote_code=base.trust_remote_code)
    renamed = _renamed(base.device_map, find_layers(meta_model)[0], layers=layers)
    return pruned.model_copy(update={"device_map": renamed})


def _renamed(devices: dict[str, int | str], layers_path: str, *, layers: Sequence[int]) -> dict[str, int | str]:
    """Return a device map with new indices of the kept layers, and without the removed ones."""
    new = {str(old): str(index) for index, old in enumerate(layers)}
    prefix, renamed = f"{layers_path}.", {}
    for path, device in devices.items():
        old, dot, rest = path.removeprefix(prefix).partition(".")
        if not path.startswith(prefix) or not old.isdigit():
            renamed[path] = device
        elif old in new:
            renamed[f"{prefix}{new[old]}{dot}{rest}"] = device
    return renamed
