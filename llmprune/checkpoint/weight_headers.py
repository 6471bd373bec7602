"""Read type and shape of every tensor from the headers of a checkpoint's weights files, without the weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from llmprune.checkpoint.file_references import INDEX, shard_names
from llmprune.common.errors import CheckpointError
from llmprune.common.hub.client import with_retries

SINGLE = "model.safetensors"
# Names of types in safetensors, and the types in torch.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the types of weights that are not quantized


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weights file. ``dtype``: its name in safetensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def floating(self) -> torch.dtype | None:
        """The floating-point type of a tensor that is not quantized; None of any other."""
        dtype = DTYPES.get(self.dtype)
        return dtype if dtype in WIDE else None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, by the bits in the name of the type."""
        bits = re.search(r"\d+", self.dtype)
        return torch.Size(self.shape).numel() * (int(bits[0]) if bits else 8) // 8


Headers = Mapping[str, StoredTensor]  # by the tensor's name in the file


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json unchanged; empty where it is no JSON object, which loading reports."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def weights_files(folder: Path, names: Iterable[str], *, shown: str) -> list[str]:
    """Return those of the files ``names`` that transformers reads weights from. Raises CheckpointError."""
    names, named = set(names), read_config(folder).get("transformers_weights")
    if isinstance(named, str):
        return shard_names(folder / named, shown) if named.endswith(".index.json") else [named]
    if SINGLE in names or INDEX not in names:
        return [name for name in (SINGLE,) if name in names]
    return shard_names(folder / INDEX, shown)


def headers_of_folder(folder: Path, shown: str) -> Headers:
    """Return the headers of a folder's weights files; empty where it has none.

    Raises CheckpointError for a file that is missing, damaged or cut short.
    """
    files = weights_files(folder, (path.name for path in folder.iterdir()), shown=shown)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{shown} lacks {len(missing)} of {len(files)} weights files that its index names ({missing[0]}); "
            "fetch the missing files"
        )
    return {name: tensor for file in files for name, tensor in _read(folder, file, shown=shown).items()}


def _read(folder: Path, file: str, *, shown: str) -> dict[str, StoredTensor]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # safe_open is no mapping
            return {name: StoredTensor(file, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(
            f"a weights file of {shown} cannot be read ({file}: {error}); it is damaged or cut short: fetch it again"
        ) from error
    except OSError as error:  # safetensors says of a file without permission that it does not exist
        raise CheckpointError(
            f"a weights file of {shown} cannot be read ({file}); check its permissions, or fetch it again"
        ) from error


def headers_of_repository(model_id: str, commit: str, *, files: tuple[str, ...]) -> Headers:
    """Return the headers of a hub model's weights files, by downloading a few kilobytes of each."""
    from huggingface_hub import HfApi

    api = HfApi()

    def fetch(file: str) -> dict[str, StoredTensor]:
        try:
            found = with_retries(lambda: api.parse_safetensors_file_metadata(model_id, file, revision=commit))
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"{file} of {model_id} has no header of a safetensors file; it is damaged: ask its owner"
            ) from error
        return {name: StoredTensor(file, info.dtype, tuple(info.shape)) for name, info in found.tensors.items()}

    with ThreadPoolExecutor(8, "headers") as threads:
        return {name: tensor for part in threads.map(fetch, files) for name, tensor in part.items()}


def main_dtype(headers: Headers) -> torch.dtype | None:
    """Return the floating-point type of most weights; None where there are none."""
    weights: Counter[torch.dtype] = Counter()
    for tensor in headers.values():
        if tensor.floating is not None:
            weights[tensor.floating] += max(torch.Size(tensor.shape).numel(), 1)
    return weights.most_common(1)[0][0] if weights else None
