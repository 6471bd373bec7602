"""Load a quantized model whole: its layers are read and dequantized one after the other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import offload_weight, set_module_tensor_to_device
from transformers import GenerationConfig, PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.layers_in_files import LayersInFiles
from llmprune.checkpoint.placement import DeviceMap
from llmprune.checkpoint.skeleton import fill_rest
from llmprune.checkpoint.weights_reader import WeightsReader

_DISK = "disk"


def load_dequantized(
    reader: WeightsReader, device_map: DeviceMap | None, *, offloaded: Path | None = None
) -> PreTrainedModel:
    """Return the model of ``reader`` with all its weights, placed by a device map; on the CPU where that is None.

    ``offloaded``: folder for weights that the map leaves on disk. Raises CheckpointError where weights cannot be read
    or dequantized.
    """
    model = reader.names.model
    layers = LayersInFiles(model, reader)
    rest = layers.read_rest()
    fill_rest(model, rest, device=torch.device("cpu"), missing=layers.absent(rest))
    index: dict[str, Any] = {}
    devices = dict(device_map or {"": "cpu"})
    for number in range(len(find_layers(model)[1])):
        for inner, tensor in layers.read(number).items():
            name = f"{layers.path}.{number}.{inner}"
            device = _device_of(name, devices)
            if device == _DISK:
                offload_weight(tensor, name, offloaded, index)
            elif not tensor.is_meta:
                set_module_tensor_to_device(model, name, device, value=tensor, dtype=tensor.dtype)
    if device_map is not None:
        for name in rest:
            if _device_of(name, devices) == _DISK:
                offload_weight(rest[name], name, offloaded, index)
        dispatch_model(
            model,
            device_map=devices,
            offload_dir=offloaded,
            offload_index=index or None,
            skip_keys=model._skip_keys_device_placement,
        )
    if model.can_generate():
        with suppress(OSError):  # a folder without generation_config.json
            model.generation_config = GenerationConfig.from_pretrained(Path(reader.folder))
    return model


def _device_of(name: str, devices: DeviceMap) -> Any:
    """Return the device of the longest path in a device map that contains a tensor."""
    parts = name.split(".")
    paths = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((devices[path] for path in (*paths, "") if path in devices), "cpu")
