"""Locate the files of a recipe's model: in a folder, in the hub client's cache, or converted from a GGUF file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llmprune.checkpoint.checkpoint_kind import names_in, without_config
from llmprune.checkpoint.download import Part, commit_of, headers, names_of, snapshot
from llmprune.checkpoint.file_references import require_own_names
from llmprune.checkpoint.gguf import cache_folder, converted_folder
from llmprune.checkpoint.pickles import cache_folder as cache_folder_of_pickles
from llmprune.checkpoint.pickles import converted_folder as converted_folder_of_pickles
from llmprune.checkpoint.pickles import pickles_in
from llmprune.checkpoint.quantized.formats import Quantization, quantization_of
from llmprune.checkpoint.weight_headers import Headers, headers_of_folder, read_config
from llmprune.common.errors import ModelError
from llmprune.recipe.model import ModelSource
from llmprune.recipe.text_source import PACKAGE_SCHEME


def folder_of(source: ModelSource, part: Part) -> Path:
    """Return a folder that has this part of the model, which is downloaded or converted where needed.

    Raises ModelError where there is no such model, or where its files name others outside the folder.
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
        trusted = source.trust_remote_code
        folder = snapshot(source.id, source.revision, part=part, with_code=trusted, pickles=source.pickles)
        if not (folder / "config.json").is_file():
            raise without_config(names_of(source.id, source.revision), source.id)
    require_own_names(folder, source.id, with_code=source.trust_remote_code, with_tokenizer=part == "tokenizer")
    pickles = _pickles_of(source, folder) if part == "weights" else []
    if pickles:
        return converted_folder_of_pickles(folder, pickles, shown=source.id, trusted=source.trust_remote_code)
    return folder


def _pickles_of(source: ModelSource, folder: Path) -> list[str]:
    """Return the pickled weights files that a model is read from; empty where it has safetensors, or may not be."""
    names = [path.name for path in folder.iterdir()] if source.pickles else []
    return pickles_in(folder, names, shown=source.id)


def reads_pickles(source: ModelSource) -> bool:
    """Check that a model is read from pickled weights, which the recipe asks for."""
    if not source.pickles or source.id.startswith(PACKAGE_SCHEME):
        return False
    commit, folder = hub_commit(source), folder_of(source, "config")
    names = names_of(source.id, source.revision) if commit else [path.name for path in folder.iterdir()]
    return bool(pickles_in(folder, names, shown=source.id))


def hub_commit(source: ModelSource) -> str | None:
    """Return the commit of a hub model's revision; None for a folder or a GGUF file in a package."""
    if source.id.startswith(PACKAGE_SCHEME) or Path(source.id).expanduser().exists():
        return None
    return commit_of(source.id, source.revision)


def identity(source: ModelSource) -> str:
    """Identify the base model for fingerprints: its commit, or a hash of its files' names, sizes and times."""
    commit = hub_commit(source)
    if commit:
        return commit
    files = sorted(path for path in folder_of(source, "config").iterdir() if path.is_file())
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def bytes_on_disk(source: ModelSource) -> int:
    """Return the bytes of the weights files."""
    return sum(path.stat().st_size for path in folder_of(source, "weights").glob("*.safetensors"))


def raw_config(source: ModelSource) -> dict[str, Any]:
    """Return a checkpoint's config.json unchanged; empty for a GGUF file, which has none."""
    return {} if source.id.startswith(PACKAGE_SCHEME) else read_config(folder_of(source, "config"))


def quantization_of_source(source: ModelSource) -> Quantization | None:
    """Return the quantization of a model's weights, as its config.json states it; None where it states none."""
    return quantization_of(raw_config(source))


def headers_of(source: ModelSource) -> Headers | None:
    """Return the headers of the weights files; empty where a folder has none, None where they are not available.

    Raises ModelError and CheckpointError.
    """
    if source.id.startswith(PACKAGE_SCHEME):
        folder = cache_folder(source.id)
        return headers_of_folder(folder, source.id) if folder.is_dir() else None
    folder = folder_of(source, "config")
    pickles = _pickles_of(source, folder)
    if pickles:
        made = cache_folder_of_pickles(folder, pickles, trusted=source.trust_remote_code)
        return headers_of_folder(made, source.id) if made.is_dir() else None
    if Path(source.id).expanduser().is_dir():
        return headers_of_folder(folder, source.id)
    found = headers(source.id, source.revision)
    return found or (None if source.pickles else found)
