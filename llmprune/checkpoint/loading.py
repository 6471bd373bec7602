"""Load a model: its config, its tokenizer, its weights, and the decoder for layer-wise passes."""

from __future__ import annotations

import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import (
    Config,
    auto_class,
    build_meta_model,
    find_layers,
    quiet_transformers,
    text_config,
)
from llmprune.checkpoint.checkpoint_kind import tokenizer_problem
from llmprune.checkpoint.config_limits import check_config_file
from llmprune.checkpoint.copied_files import is_tokenizer
from llmprune.checkpoint.disk_offload import offload_folder
from llmprune.checkpoint.download import names_of
from llmprune.checkpoint.file_references import unread_fields
from llmprune.checkpoint.gguf import cache_folder, gguf_location
from llmprune.checkpoint.location import folder_of, headers_of
from llmprune.checkpoint.stored_dtypes import require_fitting
from llmprune.checkpoint.weight_headers import Headers, main_dtype
from llmprune.common.distributed import local_device, world_size
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.recipe.model import ModelSource
from llmprune.recipe.text_source import PACKAGE_SCHEME

logger = logging.getLogger(__name__)


def load_config(source: ModelSource) -> Config:
    """Load the model's config, without its weights. Raises ModelError where there is none."""
    place, options = "", {}
    if source.id.startswith(PACKAGE_SCHEME) and not cache_folder(source.id).is_dir():
        path = gguf_location(source.id)
        place, options = str(path.parent), {"gguf_file": path.name}
    config: Config = _from_pretrained(AutoConfig, source, place=place or str(folder_of(source, "config")), **options)
    return config


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer. Raises ModelError where there is none."""
    place = folder_of(source, "tokenizer")
    if unread := tokenizer_problem([path.name for path in place.iterdir()], source.id, folder=place):
        raise ModelError(unread)
    overruled = {} if source.trust_remote_code else unread_fields(place)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, place=str(place), **overruled)
    return tokenizer


def require_tokenizer(source: ModelSource) -> None:
    """Raise ModelError where the model has no tokenizer that can be loaded.

    Of a hub model only the names of its files are checked, which are known with the config; a GGUF file always has a
    tokenizer.
    """
    if source.id.startswith(PACKAGE_SCHEME):
        return
    if Path(source.id).expanduser().is_dir():
        load_tokenizer(source)
        return
    names = names_of(source.id, source.revision)
    if unread := tokenizer_problem(names, source.id):
        raise ModelError(unread)
    if not any(is_tokenizer(name) for name in names if "/" not in name):
        raise _no_tokenizer(source)


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load the whole model, in evaluation mode, placed by the recipe's device map.

    Raises CheckpointError for missing, unexpected, misshapen or unreadable weights: transformers would fill missing
    ones with random numbers.
    """
    place = str(folder_of(source, "weights"))
    device_map: Any = source.device_map
    nothing_to_spread_over = device_map == "auto" and not torch.cuda.is_available() and not source.max_memory
    each_process_has_its_device = world_size() > 1 and not isinstance(device_map, dict) and not source.max_memory
    if device_map == "cpu" or nothing_to_spread_over or each_process_has_its_device:
        device_map = None
    config = load_config(source)
    offloaded = offload_folder() if device_map is not None else None
    model, info = _from_pretrained(
        auto_class(config),
        source,
        place=place,
        dtype=compute_dtype(source, config, found=headers_of(source)),
        device_map=device_map,
        max_memory=source.max_memory,
        offload_folder=offloaded,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported instead, and refused below
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    require_fitting({kind.split("_")[0]: sorted(map(_key, info.get(kind) or ())) for kind in kinds}, source.id)
    loaded: PreTrainedModel = model.eval()
    if offloaded is not None:
        weakref.finalize(find_layers(loaded)[1], shutil.rmtree, offloaded, ignore_errors=True)
    loaded.config.name_or_path = place  # the text part of a config may have another path
    return loaded.requires_grad_(False)


def compute_dtype(source: ModelSource, config: Config, *, found: Headers | None) -> torch.dtype:
    """Return the type to compute in: the recipe's, the config's, or that of most weights. GGUF files give float32.

    ``found``: headers of the weights files, None where they are not available.
    """
    if source.dtype != "auto":
        asked: torch.dtype = getattr(torch, source.dtype)
        return asked
    stated = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    if isinstance(stated, torch.dtype) and not source.id.startswith(PACKAGE_SCHEME):
        return stated
    return main_dtype(found or {}) or torch.float32


def _key(found: str | tuple[str, torch.Size, torch.Size]) -> str:
    """Return a tensor's name; of a misshapen one also the shape in the file and the model's."""
    if isinstance(found, str):
        return found
    name, stored, wanted = found
    return f"{name} ({list(stored)}, not {list(wanted)})"


def dense_decoder(model: PreTrainedModel) -> Decoder:
    """Make a decoder over a loaded model, whose layers stay on their devices until a layer-wise pass needs them."""
    _, layers = find_layers(model)
    skeleton = build_skeleton(model.config, model)
    devices = [_running_device(layer) for layer in layers]
    lie_elsewhere = any(parameter.device != devices[0] for parameter in layers.parameters())
    return Decoder(
        skeleton,
        lambda index: tensors_of(layers[index]),
        device_of=lambda index: devices[index],
        fetch_ahead=lie_elsewhere,
        quick=True,
    )


def build_skeleton(config: Config, model: PreTrainedModel) -> PreTrainedModel:
    """Build a model of a config without layer weights; all other tensors are those of ``model``."""
    runs_own_code = not type(model).__module__.startswith("transformers.")
    skeleton = build_meta_model(config, model.dtype, trust_remote_code=runs_own_code)
    path, _ = find_layers(skeleton)
    tensors = tensors_of(model, skip=path)
    device = _running_device(model.get_input_embeddings())
    skeleton.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, strict=False, assign=True)
    skeleton.tie_weights()
    skeleton.requires_grad_(False)
    for module_path, module in skeleton.named_modules():
        if not f"{module_path}.".startswith(f"{path}."):
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
    skeleton.generation_config = model.generation_config
    skeleton.config.name_or_path = model.config.name_or_path
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        skeleton._weight_conversions = conversions  # from the model's tensors to those of its files, for saving
    return skeleton


def tensors_of(module: nn.Module, skip: str | None = None) -> Tensors:
    """Return a module's parameters and persistent buffers by name, loaded where they are offloaded.

    ``skip``: path of a module inside whose tensors are left out.
    """
    tensors: Tensors = {}
    for path, part in module.named_modules():
        if skip is not None and f"{path}.".startswith(f"{skip}."):
            continue
        dot = f"{path}." if path else ""
        with align_module_device(part):
            for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if name not in part._non_persistent_buffers_set:
                    tensors[dot + name] = value.detach()
    return tensors


def _running_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on: its own GPU, or for offloaded weights the process's device."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type in ("cpu", "meta"):
        return local_device()
    return device


def _from_pretrained(auto: Any, source: ModelSource, *, place: str, **options: Any) -> Any:
    check_config_file(Path(place) / "config.json", source.id)
    try:
        with quiet_transformers():
            return auto.from_pretrained(place, trust_remote_code=source.trust_remote_code, **options)
    except Exception as error:  # transformers, the hub client and storage libraries raise dozens of classes
        raise _explained(auto, source, place=place, error=error) from error


def _explained(auto: Any, source: ModelSource, *, place: str, error: Exception) -> ModelError | CheckpointError:
    """Return an error that names the part that cannot be loaded, the cause and the remedy."""
    cause = _first_sentence(error)
    part = {AutoConfig: "config", AutoTokenizer: "tokenizer"}.get(auto, "weights")
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source.id} brings its own Python code; set model.trust_remote_code: true if you trust it, "
            "or choose a model that transformers knows"
        )
    if isinstance(error, SafetensorError):
        return CheckpointError(
            f"a weights file of {source.id} cannot be read ({cause}); it is damaged or cut short: fetch it again"
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ModelError(
            f"{source.id} does not fit in memory ({cause}); set model.device_map: auto, raise model.max_memory, "
            "or take a smaller model.dtype"
        )
    if isinstance(error, ImportError):
        return ModelError(f"the {part} of {source.id} needs a package that is not installed: {cause}")
    if part == "tokenizer" and not any(Path(place).glob("tokenizer*")):
        return _no_tokenizer(source)
    if part == "weights" and "safetensors" in cause:
        return CheckpointError(
            f"{source.id} lacks a safetensors weights file ({cause}); only safetensors are read, never pickles: "
            "fetch the missing file, or convert the checkpoint to safetensors"
        )
    kind = CheckpointError if part == "weights" and isinstance(error, ValueError | KeyError) else ModelError
    placed = isinstance(error, RuntimeError) and source.device_map not in ("auto", "cpu")
    remedy = "check model.device_map" if placed else "correct that, or fetch the folder's files again"
    return kind(f"the {part} of {source.id} cannot be loaded: {cause}; {remedy}")


def _no_tokenizer(source: ModelSource) -> ModelError:
    return ModelError(f"{source.id} has no tokenizer; put its files (tokenizer.json, …) beside config.json")


def _first_sentence(error: Exception) -> str:
    """Return the first line of an error's message, with the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    sentence = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    plain = isinstance(error, OSError | SafetensorError) or type(error) in (ValueError, ImportError, RuntimeError)
    return sentence if plain and sentence else f"{type(error).__name__}: {sentence}"
