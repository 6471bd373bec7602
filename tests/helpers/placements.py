"""Device maps that put the parts of a saved model on two devices, on the CPU and on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from llmprune.anatomy.meta_model import build_meta_model, find_layers
from llmprune.checkpoint.loading import load_config
from llmprune.recipe.model import ModelSource

Place = int | str
EVERYWHERE: tuple[Place, ...] = (1, "cpu", 0, "disk")


def spread(folder: Path, places: Sequence[Place] = EVERYWHERE) -> dict[str, Place]:
    """Return a map with the layers on these places in turn, the head on cuda:1 and all else on cuda:0.

    A head that shares its weights with the embeddings is where they are.
    """
    model = build_meta_model(load_config(ModelSource(id=str(folder))))
    path, _ = find_layers(model)
    device_map = _beside(model, path)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    device_map |= {
        name: 1 for name, module in model.named_modules() if module is head and head.weight is not embeddings.weight
    }
    layers = model.get_submodule(path)
    return device_map | {f"{path}.{index}": places[index % len(places)] for index in range(len(layers))}


def alternating(folder: Path) -> dict[str, Place]:
    """Return a map with the layers on two devices in turn."""
    return spread(folder, (0, 1))


def _beside(module: nn.Module, path: str, prefix: str = "") -> dict[str, Place]:
    """Return cuda:0 for the parts of a module that are not in its layers at ``path``."""
    found: dict[str, Place] = {prefix + name: 0 for name, _ in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        full = prefix + name
        if path.startswith(f"{full}."):
            found |= _beside(child, path, f"{full}.")
        elif full != path:
            found[full] = 0
    return found
