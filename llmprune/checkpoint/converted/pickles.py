"""Convert a checkpoint of pickled weights (.bin), once, to one of safetensors, where the recipe asks for it.

The files are read by torch's weights-only loader, which makes tensors and plain containers and runs no code of a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint.copied_files import CONFIG, copy_selected, select_files
from llmprune.checkpoint.file_references import INDEX, shard_names
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.common.files import apply_umask, disk_errors, fsync

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PICKLE = "pytorch_model.bin"
_SAFE = "model.safetensors"
_INDEX = "pytorch_model.bin.index.json"
_SHARD = 1 << 30  # bytes of a file of the result, which are in memory while it is written


def pickles_in(folder: Path, names: Collection[str], *, shown: str) -> list[str]:
    """Return the files of pickled weights among ``names`` that make a checkpoint; empty where it has safetensors.

    ``folder``: has their index, where there is one. Raises CheckpointError for an index that is none.
    """
    if _SAFE in names or INDEX in names:
        return []
    if _INDEX in names and (folder / _INDEX).is_file():
        return shard_names(folder / _INDEX, shown)
    return [PICKLE] if PICKLE in names else []


def cache_folder(folder: Path, pickles: Collection[str], *, trusted: bool) -> Path:
    """Return the folder of the converted checkpoint, which may not exist yet: under HF_HOME, named by the files.

    ``trusted``: its Python code is copied too.
    """
    from huggingface_hub.constants import HF_HOME

    paths = sorted({folder / name for name in pickles} | {path for path in folder.iterdir() if path.is_file()})
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    digest = hashlib.sha256(repr((str(folder.absolute()), states, trusted)).encode()).hexdigest()[:12]
    return Path(HF_HOME) / "llmprune" / f"{folder.name}-{digest}-safetensors"


def converted_folder(folder: Path, pickles: Collection[str], *, shown: str, trusted: bool) -> Path:
    """Return a folder with the checkpoint in safetensors, made once.

    Raises CheckpointError for a damaged or missing file, ModelError for one that holds other objects than tensors,
    DiskError where the cache cannot be written.
    """
    target = cache_folder(folder, pickles, trusted=trusted)
    if target.is_dir():
        return target
    missing = [name for name in pickles if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{shown} lacks {missing[0]}, which its index names; fetch the missing files")
    logger.info("converting %s of %s to safetensors once, into %s", ", ".join(pickles), shown, target)
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as private:
            made = Path(private) / target.name
            made.mkdir()
            copy_selected(folder, select_files(folder, trusted), target=made, trusted=trusted)
            shutil.copyfile(folder / CONFIG, made / CONFIG)
            _write(made, (entry for name in sorted(pickles) for entry in _tensors(folder / name, shown)))
            for file in made.rglob("*"):
                apply_umask(file)
                fsync(file)
            try:
                os.rename(made, target)
            except OSError:
                if not target.is_dir():  # otherwise another process was first, with the same result
                    raise
    return target


def _tensors(path: Path, shown: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a pickled file by name, none of which shares memory with another."""
    from torch import Tensor

    content = _load(path, shown)
    tensors = list(content.items()) if isinstance(content, dict) else []
    if not tensors or not all(isinstance(name, str) and isinstance(one, Tensor) for name, one in tensors):
        raise ModelError(
            f"{path.name} of {shown} is no mapping from names to tensors, as the weights of a checkpoint are; convert "
            "it with the program that wrote it"
        )
    seen = set()
    for name, tensor in tensors:
        storage = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)


def _load(path: Path, shown: str) -> Any:
    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path.name} of {shown} holds other objects than tensors, and making these can run code, so it is not "
            f"read ({str(error).splitlines()[0]}); convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path.name} of {shown} cannot be read ({str(error).splitlines()[0] if str(error) else 'it ends early'}); "
            "it is damaged or cut short: fetch it again"
        ) from error


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors as files of about ``_SHARD`` bytes, and their index."""
    from safetensors.torch import save_file

    pending: dict[str, Tensor] = {}
    files: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(pending, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(pending, name))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(one.nbytes for one in pending.values()) + tensor.nbytes > _SHARD:
            flush()
        pending[name] = tensor
    flush()
    index = {"metadata": {}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
