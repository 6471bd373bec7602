"""Load a model: its config, its tokenizer, its weights."""

from __future__ import annotations

import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
from llmprune.checkpoint.dequantized_model import load_dequantized
from llmprune.checkpoint.disk_offload import offload_folder
from llmprune.checkpoint.download import names_of
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.file_references import unread_fields
from llmprune.checkpoint.location import conversion_of, folder_of, headers_of, is_on_hub, quantization_of_source
from llmprune.checkpoint.placement import DeviceMap, device_map_of_whole
from llmprune.checkpoint.quantized.quantizers import drop_quantization
from llmprune.checkpoint.stored_dtypes import require_all, require_fitting
from llmprune.checkpoint.weight_headers import Headers, main_dtype, read_config
from llmprune.checkpoint.weights_reader import WeightsReader
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.data.image_processor import ImageProcessor
from llmprune.recipe.model import ModelSource

logger = logging.getLogger(__name__)
_MOST_SPECIAL_TOKENS = 1000  # fewer than any tokenizer of a language model has tokens


def load_config(source: ModelSource) -> Config:
    """Load the model's config, without its weights and their quantization. Raises ModelError where there is none."""
    return drop_quantization(_from_pretrained(AutoConfig, source, place=str(folder_of(source, "config"))))


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer. Raises ModelError where there is none."""
    place = folder_of(source, "tokenizer")
    if unread := tokenizer_problem([path.name for path in place.iterdir()], source.id, folder=place):
        raise ModelError(unread)
    overruled = {} if source.trust_remote_code else unread_fields(place)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, place=str(place), **overruled)
    if is_empty(tokenizer):
        raise _no_tokenizer(source)
    return tokenizer


def is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer has special tokens alone, as transformers makes it for many types without files."""
    if len(tokenizer) >= _MOST_SPECIAL_TOKENS:
        return False
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return special.issuperset(tokenizer.get_vocab())


def load_processor(source: ModelSource, config: Config) -> ImageProcessor:
    """Load the processor of a model that reads images. Raises ModelError where there is none."""
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if text_config(config) is config or not isinstance(token, int):
        raise ModelError(
            f"{source.id} does not read images (its config names no image token), and calibration.images_field asks "
            "for them; remove images_field, or prune a model that does"
        )
    place = folder_of(source, "tokenizer")
    processor = _from_pretrained(AutoProcessor, source, place=str(place))
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{source.id} has no image processor; put its preprocessor_config.json beside config.json")
    return ImageProcessor(processor, placeholder=token, shown=source.id)


def require_tokenizer(source: ModelSource) -> None:
    """Raise ModelError where the model has no tokenizer that can be loaded.

    Of a hub model only the names of its files are checked, which are known with the config.
    """
    if conversion_of(source) is not None or not is_on_hub(source):
        load_tokenizer(source)
        return
    names = names_of(source.id, source.revision)
    if unread := tokenizer_problem(names, source.id):
        raise ModelError(unread)
    if not any(is_tokenizer(name) for name in names if "/" not in name):
        raise _no_tokenizer(source)


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load the whole model, in evaluation mode, placed by the recipe's device map. Quantized weights are dequantized.

    Raises CheckpointError for missing, unexpected, misshapen or unreadable weights: transformers would fill missing
    ones with random numbers.
    """
    folder = folder_of(source, "weights")
    config, headers = load_config(source), headers_of(source)
    dtype = compute_dtype(source, config, found=headers)
    empty = build_meta_model(config, dtype, trust_remote_code=source.trust_remote_code)
    device_map = device_map_of_whole(source, empty)
    offloaded = offload_folder() if device_map is not None and "disk" in device_map.values() else None
    quantization = quantization_of_source(source)
    if quantization is None:
        loaded = _load_plain(source, config, dtype=dtype, device_map=device_map, offloaded=offloaded)
    else:
        names = FileNames(empty, headers or {}, quantization=quantization)
        reader = WeightsReader(names, folder, shown=source.id)
        require_all(names, source.id)
        loaded = load_dequantized(reader, device_map, offloaded=offloaded).eval()
    if offloaded is not None:
        weakref.finalize(find_layers(loaded)[1], shutil.rmtree, offloaded, ignore_errors=True)
    loaded.config.name_or_path = str(folder)  # the text part of a config may have another path
    return loaded.requires_grad_(False)


def _load_plain(
    source: ModelSource, config: Config, *, dtype: torch.dtype, device_map: DeviceMap | None, offloaded: Path | None
) -> PreTrainedModel:
    """Load a model whose weights are not quantized, as transformers does."""
    model, info = _from_pretrained(
        auto_class(config),
        source,
        place=str(folder_of(source, "weights")),
        dtype=dtype,
        device_map=None if device_map is None else dict(device_map),
        offload_folder=offloaded,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported instead, and refused below
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    require_fitting({kind.split("_")[0]: sorted(map(_key, info.get(kind) or ())) for kind in kinds}, source.id)
    loaded: PreTrainedModel = model.eval()
    return loaded


def compute_dtype(source: ModelSource, config: Config, *, found: Headers | None) -> torch.dtype:
    """Return the type to compute in: the recipe's, the config's, or that of most weights.

    Quantized weights whose config names no type give bfloat16.

    ``found``: headers of the weights files, None where they are not available.
    """
    if source.dtype != "auto":
        asked: torch.dtype = getattr(torch, source.dtype)
        return asked
    stated = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    if quantization_of_source(source) is not None:
        return torch.bfloat16
    return main_dtype(found or {}) or torch.float32


def _key(found: str | tuple[str, torch.Size, torch.Size]) -> str:
    """Return a tensor's name; of a misshapen one also the shape in the file and the model's."""
    if isinstance(found, str):
        return found
    name, stored, wanted = found
    return f"{name} ({list(stored)}, not {list(wanted)})"


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
    fields = read_config(Path(place)) if auto is AutoConfig else {}
    if fields and "model_type" not in fields:
        what = f"a {fields['_class_name']} of diffusers" if "_class_name" in fields else "no checkpoint of transformers"
        return ModelError(
            f"{source.id} is {what} (its config.json has no model_type); give the folder of a language model"
        )
    part = {AutoConfig: "config", AutoTokenizer: "tokenizer", AutoProcessor: "processor"}.get(auto, "weights")
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
        return ModelError(f"the {part} of {source.id} needs a package that is not installed: {cause}; install it")
    if part == "tokenizer" and not any(Path(place).glob("tokenizer*")):
        return _no_tokenizer(source)
    if part == "weights" and "safetensors" in cause:
        return no_weights(source, cause)
    kind = CheckpointError if part == "weights" and isinstance(error, ValueError | KeyError) else ModelError
    placed = isinstance(error, RuntimeError) and source.device_map not in ("auto", "cpu")
    remedy = "check model.device_map" if placed else "correct that, or fetch the folder's files again"
    return kind(f"the {part} of {source.id} cannot be loaded: {cause}; {remedy}")


def no_weights(source: ModelSource, cause: str) -> CheckpointError:
    """Return the error for a checkpoint without safetensors weights."""
    return CheckpointError(
        f"{source.id} lacks a safetensors weights file ({cause}); only safetensors are read, never pickles: "
        "fetch the missing file, or convert the checkpoint to safetensors"
    )


def _no_tokenizer(source: ModelSource) -> ModelError:
    return ModelError(f"{source.id} has no tokenizer; put its files (tokenizer.json, …) beside config.json")


def _first_sentence(error: Exception) -> str:
    """Return the first line of an error's message, with the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    sentence = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    plain = isinstance(error, OSError | SafetensorError) or type(error) in (ValueError, ImportError, RuntimeError)
    return sentence if plain and sentence else f"{type(error).__name__}: {sentence}"
