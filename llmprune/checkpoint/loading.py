"""Load a model as it is: config, tokenizer, weights, and the decoder that the walk visits."""

from __future__ import annotations

import hashlib
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
from llmprune.checkpoint.checkpoint_kind import names_in, tokenizer_problem, without_config
from llmprune.checkpoint.config_limits import check_config_file
from llmprune.checkpoint.copied_files import is_tokenizer
from llmprune.checkpoint.disk_offload import offload_folder
from llmprune.checkpoint.download import Part, commit_of, headers, names_of, snapshot
from llmprune.checkpoint.file_references import require_own_names, unread_fields
from llmprune.checkpoint.gguf import cache_folder, converted_folder, gguf_location
from llmprune.checkpoint.stored_dtypes import require_fitting
from llmprune.checkpoint.weight_headers import Headers, headers_of_folder, main_dtype, read_config
from llmprune.common.distributed import count, local_device
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.recipe.model import ModelSource
from llmprune.recipe.text_source import PACKAGE_SCHEME

logger = logging.getLogger(__name__)


def load_config(source: ModelSource) -> Config:
    """The model's config, without reading weights. Raises ModelError where there is none."""
    place, options = "", {}
    if source.id.startswith(PACKAGE_SCHEME) and not cache_folder(source.id).is_dir():
        path = gguf_location(source.id)
        place, options = str(path.parent), {"gguf_file": path.name}
    config: Config = _from_pretrained(AutoConfig, source, place=place or str(place_of(source, "config")), **options)
    return config


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError where there is none."""
    place = place_of(source, "tokenizer")
    if unread := tokenizer_problem([path.name for path in place.iterdir()], source.id, folder=place):
        raise ModelError(unread)
    overruled = {} if source.trust_remote_code else unread_fields(place)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, place=str(place), **overruled)
    return tokenizer


def require_tokenizer(source: ModelSource) -> None:
    """Raise ModelError where the model has no tokenizer that can be loaded.

    Of a hub model only the names of its files are looked at, which came with the config; a packaged file has one.
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
    """The whole model, placed by the recipe's device map.

    Raises CheckpointError on missing, unexpected, misshapen or unreadable weights:
    transformers would fill what is missing with random numbers.
    """
    place = str(place_of(source, "weights"))
    device_map: Any = source.device_map
    nothing_to_spread_over = device_map == "auto" and not torch.cuda.is_available() and not source.max_memory
    each_process_has_its_device = count() > 1 and not isinstance(device_map, dict) and not source.max_memory
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
        ignore_mismatched_sizes=True,  # not ignored: listed, and refused below
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    require_fitting({kind.split("_")[0]: sorted(map(_key, info.get(kind) or ())) for kind in kinds}, source.id)
    loaded: PreTrainedModel = model.eval()
    if offloaded is not None:
        weakref.finalize(find_layers(loaded)[1], shutil.rmtree, offloaded, ignore_errors=True)
    loaded.config.name_or_path = place  # saving looks there for licences; a part of a config may have another path
    return loaded.requires_grad_(False)


def headers_of(source: ModelSource) -> Headers | None:
    """Return the headers of the weights files; empty where a folder has none, None where they are not at hand.

    Raises ModelError and CheckpointError.
    """
    if source.id.startswith(PACKAGE_SCHEME):
        folder = cache_folder(source.id)
        return headers_of_folder(folder, source.id) if folder.is_dir() else None
    folder = place_of(source, "config")
    if Path(source.id).expanduser().is_dir():
        return headers_of_folder(folder, source.id)
    return headers(source.id, source.revision)


def raw_config(source: ModelSource) -> dict[str, Any]:
    """Return a checkpoint's config.json as it stands; empty for a GGUF file, which has none."""
    return {} if source.id.startswith(PACKAGE_SCHEME) else read_config(place_of(source, "config"))


def compute_dtype(source: ModelSource, config: Config, *, found: Headers | None) -> torch.dtype:
    """Return the type to compute in: the recipe's, the config's, or the one that most weights of the files have.

    A GGUF file is converted to float32.
    """
    if source.dtype != "auto":
        asked: torch.dtype = getattr(torch, source.dtype)
        return asked
    said = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    if isinstance(said, torch.dtype) and not source.id.startswith(PACKAGE_SCHEME):
        return said
    return main_dtype(found or {}) or torch.float32


def _key(found: str | tuple[str, torch.Size, torch.Size]) -> str:
    """A tensor's name; of a misshapen one with the shape it has and the one it should have."""
    if isinstance(found, str):
        return found
    name, stored, wanted = found
    return f"{name} ({list(stored)}, not {list(wanted)})"


def identity(source: ModelSource) -> str:
    """What a fingerprint needs of the base model: its commit, or the state of its files."""
    commit = hub_commit(source)
    if commit:
        return commit
    files = sorted(path for path in place_of(source, "config").iterdir() if path.is_file())
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def bytes_on_disk(source: ModelSource) -> int:
    """Bytes of the weights' files."""
    return sum(path.stat().st_size for path in place_of(source, "weights").glob("*.safetensors"))


def dense_decoder(model: PreTrainedModel) -> Decoder:
    """A decoder over a loaded model: its layers stay where the device map put them until they are visited."""
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
    """A model of this config without layer weights; all other tensors are those of ``model``."""
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
        skeleton._weight_conversions = conversions  # how the files' tensors differ from memory, for saving
    return skeleton


def tensors_of(module: nn.Module, skip: str | None = None) -> Tensors:
    """A module's parameters and persistent buffers by name, brought back from offloading where needed."""
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
    """Where a module computes: its own GPU, or the first GPU for what is offloaded, or the CPU."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type in ("cpu", "meta"):
        return local_device()
    return device


def place_of(source: ModelSource, part: Part) -> Path:
    """The folder that has this part of the model: of a hub model a part of its cached snapshot.

    A packaged GGUF file is converted once. Raises ModelError where there is no such model, or where its files name
    others that lie elsewhere.
    """
    if source.id.startswith(PACKAGE_SCHEME):
        return converted_folder(source.id)
    folder = Path(source.id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise without_config(names_in(folder), source.id)
    elif folder.exists():
        raise ModelError(f"{source.id} is a file; give the folder of a Hugging Face checkpoint")
    elif source.id.startswith(("/", ".", "~")) or source.id.count("/") > 1:
        raise ModelError(f"the model folder {source.id} does not exist; give a hub id (org/name) or an existing folder")
    else:
        folder = snapshot(source.id, source.revision, part=part, with_code=source.trust_remote_code)
        if not (folder / "config.json").is_file():
            raise without_config(names_of(source.id, source.revision), source.id)
    require_own_names(folder, source.id, with_code=source.trust_remote_code, with_tokenizer=part == "tokenizer")
    return folder


def hub_commit(source: ModelSource) -> str | None:
    """The commit that a hub model's revision is; None for a folder or a packaged file."""
    if source.id.startswith(PACKAGE_SCHEME) or Path(source.id).expanduser().exists():
        return None
    return commit_of(source.id, source.revision)


def _from_pretrained(auto: Any, source: ModelSource, *, place: str, **options: Any) -> Any:
    check_config_file(Path(place) / "config.json", source.id)
    try:
        with quiet_transformers():
            return auto.from_pretrained(place, trust_remote_code=source.trust_remote_code, **options)
    except Exception as error:  # transformers, the hub client and the kinds of storage raise dozens of kinds
        raise _explain(auto, source, place=place, error=error) from error


def _explain(auto: Any, source: ModelSource, *, place: str, error: Exception) -> ModelError | CheckpointError:
    said = _first_sentence(error)
    part = {AutoConfig: "config", AutoTokenizer: "tokenizer"}.get(auto, "weights")
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source.id} brings its own Python code; set model.trust_remote_code: true if you trust it, "
            "or choose a model that transformers knows"
        )
    if isinstance(error, SafetensorError):
        return CheckpointError(
            f"a weights file of {source.id} cannot be read ({said}); it is damaged or cut short: fetch it again"
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ModelError(
            f"{source.id} does not fit in memory ({said}); set model.device_map: auto, raise model.max_memory, "
            "or take a smaller model.dtype"
        )
    if isinstance(error, ImportError):
        return ModelError(f"the {part} of {source.id} needs a package that is not installed: {said}")
    if part == "tokenizer" and not any(Path(place).glob("tokenizer*")):
        return _no_tokenizer(source)
    if part == "weights" and "safetensors" in said:
        return CheckpointError(
            f"{source.id} lacks a safetensors weights file ({said}); only safetensors are read, never pickles: "
            "fetch the missing file, or convert the checkpoint to safetensors"
        )
    kind = CheckpointError if part == "weights" and isinstance(error, ValueError | KeyError) else ModelError
    placed = isinstance(error, RuntimeError) and source.device_map not in ("auto", "cpu")
    remedy = "check model.device_map" if placed else "correct what is said, or fetch the folder's files again"
    return kind(f"the {part} of {source.id} cannot be loaded: {said}; {remedy}")


def _no_tokenizer(source: ModelSource) -> ModelError:
    return ModelError(f"{source.id} has no tokenizer; put its files (tokenizer.json, …) beside config.json")


def _first_sentence(error: Exception) -> str:
    """The first line that an error says, with the next where it only announces that."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    said = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    plain = isinstance(error, OSError | SafetensorError) or type(error) in (ValueError, ImportError, RuntimeError)
    return said if plain and said else f"{type(error).__name__}: {said}"
