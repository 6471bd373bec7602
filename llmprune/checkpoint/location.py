"""Locate the files of a recipe's model: in a folder, in the hub client's cache, or converted from other files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmprune.checkpoint.checkpoint_kind import has_own_weights, names_in, problems_of_kind, without_config
from llmprune.checkpoint.converted.adapter import ADAPTER_WEIGHTS, base_of, is_of_tokenizer, read_adapter
from llmprune.checkpoint.converted.conversion import Conversion
from llmprune.checkpoint.converted.gguf import chosen_gguf, gguf_conversion, gguf_in_package, parts_in
from llmprune.checkpoint.converted.pickles import cache_folder as cache_folder_of_pickles
from llmprune.checkpoint.converted.pickles import converted_folder as converted_folder_of_pickles
from llmprune.checkpoint.converted.pickles import pickles_in
from llmprune.checkpoint.download import Part, commit_of, fetch, headers, names_of, snapshot
from llmprune.checkpoint.file_references import ADAPTER, adapter_problem, require_own_names
from llmprune.checkpoint.local_paths import is_path, local_folder
from llmprune.checkpoint.quantized.formats import Quantization, quantization_of
from llmprune.checkpoint.weight_headers import Headers, headers_of_folder, read_config
from llmprune.common.errors import ModelError
from llmprune.common.libraries import ignore_missing_kernels
from llmprune.recipe.model import ModelSource
from llmprune.recipe.text_source import PACKAGE_SCHEME

_WANTED = "a hub id (org/name), the folder of a Hugging Face checkpoint, or a .gguf file"


def folder_of(source: ModelSource, part: Part) -> Path:
    """Return a folder that has this part of the model, which is downloaded or converted where needed.

    Raises ModelError where there is no such model, or where its files name others outside the folder.
    """
    conversion = conversion_of(source)
    if conversion is not None:
        return conversion.place(whole=part == "weights")
    folder = local_folder(source.id, wanted=_WANTED)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise without_config(names_in(folder), source.id)
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
    """Check that a model, or an adapter's base, is read from pickled weights, which the recipe asks for."""
    if not source.pickles:
        return False
    conversion = conversion_of(source)
    if conversion is not None:
        return conversion.is_base_pickled
    folder = folder_of(source, "config")
    names = names_of(source.id, source.revision) if is_on_hub(source) else [path.name for path in folder.iterdir()]
    return bool(pickles_in(folder, names, shown=source.id))


def conversion_of(source: ModelSource) -> Conversion | None:
    """Return how a model's checkpoint is made from other files; None where it has one.

    A hub model's list of files, an adapter and a GGUF file are downloaded for it, and no other weights. Raises
    ModelError.
    """
    if source.id.startswith(PACKAGE_SCHEME):
        _refuse_unused(source, gguf=source.gguf, base=source.base)
        return gguf_conversion([gguf_in_package(source.id)])
    folder = Path(source.id).expanduser()
    if folder.is_file() and folder.suffix == ".gguf":
        _refuse_unused(source, base=source.base)
        names = chosen_gguf([path.name for path in folder.parent.iterdir()], folder.name, shown=str(folder.parent))
        return gguf_conversion(parts_in(folder.parent, names, shown=str(folder.parent)))
    if folder.exists() or is_path(source.id):
        if not folder.is_dir():
            return None
        names = [path.name for path in folder.iterdir()]
        if source.gguf is not None:
            names += [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    else:
        return _conversion_in(source, _names_at(source.id, commit_of(source.id, source.revision)), folder=None)
    return _conversion_in(source, names, folder=folder)


@lru_cache
def _names_at(model_id: str, commit: str) -> tuple[str, ...]:
    """Return the names of the files of a hub model, asked for once."""
    snapshot(model_id, commit, part="config")
    return tuple(names_of(model_id, commit))


def _conversion_in(source: ModelSource, names: Collection[str], *, folder: Path | None) -> Conversion | None:
    """Return how the checkpoint of a folder or, without one, of a hub model is made, by the names of its files."""
    top = [name for name in names if "/" not in name]
    if source.gguf is None and ADAPTER in top:
        if has_own_weights(top):
            raise ModelError(adapter_problem(source.id))
        return _adapter_conversion(source, top, folder=folder)
    _refuse_unused(source, base=source.base)
    if source.gguf is None and "config.json" in top:
        return None
    wanted = chosen_gguf(names if source.gguf else top, source.gguf, shown=source.id)
    if not wanted:
        return None
    place = folder or fetch(source.id, source.revision, names=wanted)
    return gguf_conversion(parts_in(place, wanted, shown=source.id))


def _adapter_conversion(source: ModelSource, names: Collection[str], *, folder: Path | None) -> Conversion:
    """Return how an adapter and its base make one checkpoint."""
    ignore_missing_kernels()
    from llmprune.checkpoint.converted.adapter_merge import AdapterBase, adapter_conversion

    if folder is None:
        wanted = [name for name in names if name in (ADAPTER, ADAPTER_WEIGHTS, "README.md") or is_of_tokenizer(name)]
        folder = fetch(source.id, source.revision, names=wanted)
    require_own_names(folder, source.id, with_code=False, with_tokenizer=True, is_adapter=True)
    base = base_of(read_adapter(folder, source.id), source)
    try:
        if (Path(base.id).expanduser() / ADAPTER).is_file():
            raise ModelError("it is an adapter too")
        made = conversion_of(base)
        if made is not None and made.base is not None:
            raise ModelError(f"it is an adapter of {made.base} too")
        if made is None:
            _require_readable(base)
        place = AdapterBase(base, identity(base), lambda whole: folder_of(base, "weights" if whole else "tokenizer"))
    except ModelError as error:
        raise ModelError(
            f"{source.id} is an adapter whose base {base.id} cannot be used: {error}; to take another, such as a "
            "folder on this machine, set model.base"
        ) from error
    return replace(adapter_conversion(read_adapter(folder, source.id), place), is_base_pickled=reads_pickles(base))


def _require_readable(base: ModelSource) -> None:
    """Raise ModelError where the files of an adapter's base are none that can be pruned."""
    folder = folder_of(base, "config")
    names = _names_at(base.id, commit_of(base.id, base.revision)) if is_on_hub(base) else names_in(folder)
    problems = problems_of_kind(names, read_config(folder), headers=None, shown=base.id, pickles=base.pickles)
    if problems:
        raise ModelError("; also: ".join(problems))


def _refuse_unused(source: ModelSource, *, gguf: str | None = None, base: str | None = None) -> None:
    """Raise ModelError for a key that this model has no use for."""
    if gguf is not None:
        raise ModelError(f"model.gguf: {source.id} names its GGUF file itself; remove gguf")
    if base is not None:
        raise ModelError(f"model.base: {source.id} is no adapter (it has no {ADAPTER}), so it has no base; remove base")


def is_on_hub(source: ModelSource) -> bool:
    """Check that a model is on the hub, not in a folder, file or package of this machine."""
    return not source.id.startswith(PACKAGE_SCHEME) and not Path(source.id).expanduser().exists()


def hub_commit(source: ModelSource) -> str | None:
    """Return the commit of a hub model's revision; None for a folder or a GGUF file of this machine."""
    return commit_of(source.id, source.revision) if is_on_hub(source) else None


def identity(source: ModelSource) -> str:
    """Identify the base model for fingerprints: its commit, its content, or its files' names, sizes and times."""
    conversion = conversion_of(source)
    if conversion is not None:
        return conversion.name
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
    """Return a checkpoint's config.json unchanged."""
    return read_config(folder_of(source, "config"))


def quantization_of_source(source: ModelSource) -> Quantization | None:
    """Return the quantization of a model's weights, as its config.json states it; None where it states none."""
    return quantization_of(raw_config(source))


def headers_of(source: ModelSource) -> Headers | None:
    """Return the headers of the weights files; empty where a folder has none, None where they are not available.

    Raises ModelError and CheckpointError.
    """
    conversion = conversion_of(source)
    if conversion is not None:
        return headers_of_folder(conversion.folder, source.id) if conversion.folder.is_dir() else None
    folder = folder_of(source, "config")
    pickles = _pickles_of(source, folder)
    if pickles:
        made = cache_folder_of_pickles(folder, pickles, trusted=source.trust_remote_code)
        return headers_of_folder(made, source.id) if made.is_dir() else None
    if not is_on_hub(source):
        return headers_of_folder(folder, source.id)
    found = headers(source.id, source.revision)
    return found or (None if source.pickles else found)
