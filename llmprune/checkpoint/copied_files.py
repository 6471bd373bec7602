"""Choose the files of a base model that are copied to the result, and copy them byte for byte.

A file is judged by its name, its size and, for JSON, its content. Left out are weights, files that describe them,
folders of other formats, code that is not trusted, large files and the files that llmprune writes itself. Everything
else is copied: tokenizers, templates, licences, settings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from llmprune.checkpoint.file_references import NOTICES, TEMPLATES
from llmprune.common.errors import ModelError
from llmprune.common.files import read_json
from llmprune.common.paths import is_inside, is_plain_path
from llmprune.common.printing import printable
from llmprune.common.schema import format_size

CONFIG = "config.json"
LARGEST = 64_000_000  # bytes of a copied file, tokenizers excepted

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|npz|npy|ot|pkl|pickle|joblib|mlmodel|tflite"
    r"|zip|tar|gz|7z)",
    re.IGNORECASE,
)
_CODE = re.compile(r".*\.(py|pyc|ipynb|sh|bat|so|dll|exe|c|cc|cpp|cu|cuh|h|hpp|js)", re.IGNORECASE)
_NAMES_CODE = ("auto_map", "custom_pipelines")  # fields of JSON files
_OF_WEIGHTS = re.compile(  # indexes, checksums, signatures, and files that training or quantization left
    r".*\.index\.json|.*\.(sha\d+|md5|sig|chk|asc)|(SHA\d+|MD5)SUMS.*|adapter_.*|quantiz\w*config\.json"
    r"|(hf_)?quant_config\.json|recipe\.yaml|trainer_state\.json|training_args.*|\w+_results\.json|imatrix.*",
    re.IGNORECASE,
)
_OURS = ("README*", "llmprune.json", ".*", CONFIG, "config.*.json")
_TOKENIZERS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "spiece*",
    "sentencepiece*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken*",
)
_SHAPES = {"num_hidden_layers", "n_layers", "n_layer", "num_layers"}  # a JSON file with one of these describes a model
_ELSEWHERE = "is in a subfolder of another format"
_ODD_NAME = "its name is not a plain relative path"
_TENSOR = re.compile(r"[\w.]+\.(weight|bias)")


@dataclass(frozen=True)
class FileSelection:
    """Files of a base model, as paths relative to its folder.

    ``copied``: files that the result gets. ``left_out``: every other file that a user may miss, with the reason.
    """

    copied: tuple[str, ...]
    left_out: dict[str, str]


def select_files(folder: Path, trusted: bool) -> FileSelection:
    """Judge every file of a base model's folder. ``trusted``: its Python code is copied too.

    Raises ModelError for a file that is to be copied and cannot be read.
    """
    copied, left_out = [], {}
    for path in sorted(_entries(folder, trusted)):
        name = path.relative_to(folder).as_posix()
        reason = _reason(path, folder, trusted=trusted)
        if reason:
            left_out[printable(name)] = reason
        elif reason is None:
            _require_readable(path, name)
            copied.append(name)
    return FileSelection(tuple(copied), left_out)


def copy_selected(folder: Path, selection: FileSelection, *, target: Path, trusted: bool) -> None:
    """Copy the selected files byte for byte, except that JSON files lose the names of code that is not copied."""
    for name in selection.copied:
        path, copy = folder / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        fields = _fields(path) if path.suffix == ".json" and not trusted else {}
        if without_code(fields, trusted):
            copy.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, copy)


def is_copied(name: str, size: int, *, trusted: bool) -> bool:
    """Check by its path and size whether a file is copied. Its content, once known, may still rule it out."""
    return not _is_ours(name) and _reason_by_name(name, size, trusted=trusted) is None


def select_by_name(sizes: Mapping[str, int], trusted: bool) -> FileSelection:
    """Judge files by their paths and sizes in bytes, before they are downloaded."""
    others = [name for name in sorted(sizes) if not _is_ours(name) and not _WEIGHTS.fullmatch(name)]
    reasons = {name: _reason_by_name(name, sizes[name], trusted=trusted) for name in others}
    left_out = {printable(name): reason for name, reason in reasons.items() if reason}
    return FileSelection(tuple(name for name in others if not reasons[name]), left_out)


def _reason_by_name(name: str, size: int, *, trusted: bool) -> str | None:
    path = PurePosixPath(name)
    if not is_plain_path(name):
        return _ODD_NAME
    return _reason_of_kind(name, size, trusted=trusted) if _may_be_copied_from(path, trusted) else _ELSEWHERE


def without_code(fields: dict[str, Any], trusted: bool) -> bool:
    """Remove the fields that name Python files, in place, unless code is trusted. Return True if any was removed."""
    named = [] if trusted else [name for name in _NAMES_CODE if name in fields]
    for name in named:
        del fields[name]
    return bool(named)


def _entries(folder: Path, trusted: bool) -> Iterator[Path]:
    """Yield the entries at the top of a folder, and all files of those subfolders from which some may be copied."""
    for entry in folder.iterdir():
        if entry.is_symlink() or not entry.is_dir():
            yield entry
            continue
        inner = [Path(at) / name for at, _, names in os.walk(entry) for name in names]
        some = any(_may_be_copied_from(PurePosixPath(path.relative_to(folder)), trusted) for path in inner)
        yield from inner if some else [entry]


def _may_be_copied_from(path: PurePosixPath, trusted: bool) -> bool:
    """Check that a path is at the top or in a folder of licences or templates, or is trusted code."""
    top = path.parts[0]
    in_known = top == TEMPLATES or any(fnmatch(top, pattern) for pattern in NOTICES)
    is_code = trusted and bool(_CODE.fullmatch(path.name)) and not any(part.startswith(".") for part in path.parts)
    return len(path.parts) == 1 or in_known or is_code


def _is_ours(name: str) -> bool:
    """Check for a file that llmprune writes itself, or that does not belong to the model, such as a README."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _OURS)


def _reason(path: Path, folder: Path, *, trusted: bool) -> str | None:
    """Return why a file is not copied: None if it is copied, empty if the reason is not worth reporting."""
    name = path.relative_to(folder).as_posix()
    if _is_ours(name) or (_WEIGHTS.fullmatch(name) and path.is_file()):
        return ""
    if not is_plain_path(name):
        return _ODD_NAME
    if not path.is_file():
        return _ELSEWHERE if path.is_dir() and not path.is_symlink() else "no regular file"
    if not is_inside(path, folder):
        return "a link that leads out of the model's folder"
    if not _may_be_copied_from(PurePosixPath(name), trusted):
        return _ELSEWHERE
    return _reason_of_kind(name, path.stat().st_size, trusted=trusted) or _reason_of_content(path, name)


def _reason_of_kind(name: str, size: int, *, trusted: bool) -> str | None:
    last = PurePosixPath(name).name
    if _WEIGHTS.fullmatch(last):
        return "weights"
    if _OF_WEIGHTS.fullmatch(last):
        return "describes the base's weights"
    if not trusted and _CODE.fullmatch(last):
        return "code, which the recipe does not trust"
    if size > LARGEST and not is_tokenizer(last):
        return f"larger than {format_size(LARGEST)}"
    return None


def _reason_of_content(path: Path, name: str) -> str | None:
    if path.suffix != ".json" or is_tokenizer(name):
        return None
    fields = _fields(path)
    if _SHAPES & fields.keys() or any(map(_names_tensor, [*fields.items(), *fields.values()])):
        return "describes the base's weights"
    return None


def _names_tensor(value: Any) -> bool:
    """Check whether a list, or the keys of a mapping, include the name of a tensor."""
    texts = value if isinstance(value, list | tuple | dict) else ()
    return any(isinstance(text, str) and bool(_TENSOR.fullmatch(text)) for text in texts)


def is_tokenizer(name: str) -> bool:
    """Check by its name that a file belongs to a tokenizer."""
    return any(fnmatch(name, pattern) for pattern in _TOKENIZERS)


def _fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; empty where it is not a JSON object."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def _require_readable(path: Path, name: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(
            f"{name} of the base model is copied to the result, and it cannot be read ({error.strerror}); "
            "make it readable, or take it out of the folder"
        ) from error
