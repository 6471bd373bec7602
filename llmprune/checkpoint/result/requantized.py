"""Write a pruned checkpoint again with the weights quantized that its base has quantized, in the base's format.

The result is stored as the base is: the same tensors for each weight, and its ``quantization_config`` with the modules
that are left out renumbered. One weight at a time is quantized; a file's tensors are in memory together.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.checkpoint.quantized.formats import CONFIG_FIELD, Quantization
from llmprune.checkpoint.quantized.quantize import Shapes, Store, quantize_of
from llmprune.checkpoint.weight_headers import Headers
from llmprune.common.errors import ModelError
from llmprune.common.files import disk_errors, fsync

_INDEX = "model.safetensors.index.json"
# What follows the path of a quantized weight in the base's files, by method. The first that is there tells that it is.
_MARKS = {
    "fp8": ("weight_scale_inv", "weight_scale"),
    "compressed-tensors": ("weight_scale",),
    "bitsandbytes": ("weight.absmax", "SCB"),
}
_LEFT_OUT = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore")


@dataclass(frozen=True)
class QuantizedBase:
    """A quantized base. ``layers``: the indices in it of the layers that the result has; ``path``: of the layers."""

    quantization: Quantization
    headers: Headers
    layers: Sequence[int]
    path: str

    def stored(self, name: str) -> Shapes | None:
        """Return the shapes of what the base stores for a weight of the result; None where it is not quantized."""
        found = self.by_kind.get(_kind(self._in_base(name)))
        return found if name.endswith(".weight") else None

    @cached_property
    def by_kind(self) -> dict[str, Shapes]:
        """Shapes of the tensors of each quantized weight, by its name with * for numbers of experts."""
        found: dict[str, Shapes] = {}
        for mark in _MARKS[self.quantization.method]:
            for name in self.headers:
                if name.endswith(f".{mark}"):
                    path = name.removesuffix(f".{mark}")
                    found.setdefault(_kind(f"{path}.weight"), self._parts(path))
        return found

    def _parts(self, path: str) -> Shapes:
        names = ("weight_scale_inv", "weight_scale", "weight_format", "weight")
        return {name: self.headers[f"{path}.{name}"].shape for name in names if f"{path}.{name}" in self.headers}

    def _in_base(self, name: str) -> str:
        """Return the name that a tensor of the result has in the base, whose layers have other numbers."""
        return self.layer.sub(lambda match: f"{match[1]}{self.layers[int(match[2])]}{match[3]}", name, count=1)

    @property
    def layer(self) -> re.Pattern[str]:
        """Pattern of the number of a layer in the name of a tensor."""
        return re.compile(rf"((?:^|\.){re.escape(self.path.rsplit('.', 1)[-1])}\.)(\d+)(\.)")


def require_requantizable(quantization: Quantization | None) -> None:
    """Raise ModelError where a base is not quantized, or in a format that is not written here."""
    if quantization is None:
        raise ModelError("export.requantize: the model is not quantized; leave requantize out")
    quantize_of(quantization)


def write_requantized(source: Path, target: Path, *, base: QuantizedBase) -> int:
    """Write the checkpoint in ``source`` quantized into ``target``; return the number of quantized weights.

    Raises ModelError where no weight of the result is one that the base has quantized.
    """
    store, count = quantize_of(base.quantization), 0
    shutil.rmtree(target, ignore_errors=True)
    with disk_errors(target):
        target.mkdir(parents=True)
        weights: dict[str, str] = {}
        left: list[str] = []
        for path in sorted(source.iterdir()):
            if path.suffix == ".safetensors":
                tensors, number, plain = _quantized(path, base, store=store)
                count += number
                left += plain
                save_file(tensors, target / path.name, {"format": "pt"})
                weights |= dict.fromkeys(tensors, path.name)
            elif path.is_dir():
                shutil.copytree(path, target / path.name)
            elif path.name not in ("config.json", _INDEX):
                shutil.copy2(path, target / path.name)
        if not count:
            raise ModelError(
                "export.requantize: the weights that the base has quantized have other names in the result; leave "
                "requantize out, and quantize the result with llm-compressor"
            )
        if (source / _INDEX).is_file():
            size = sum((target / name).stat().st_size for name in set(weights.values()))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weights.items()))}
            _write_json(target / _INDEX, index)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        _write_json(target / "config.json", config | {CONFIG_FIELD: settings_of_result(base, left)})
        for path in target.rglob("*"):
            fsync(path)
    return count


def settings_of_result(base: QuantizedBase, plain: Sequence[str]) -> dict[str, Any]:
    """Return the base's settings with the modules that are left out as the result numbers them.

    ``plain``: paths of the matrices of layers that are not quantized.
    """
    settings = dict(base.quantization.settings)
    for key in _LEFT_OUT:
        named = settings.get(key)
        if named:
            kept = [name for name in named if not base.layer.search(f"{name}.")]
            settings[key] = list(dict.fromkeys([*kept, *(plain if len(kept) < len(named) else ())]))
    return settings


def _quantized(path: Path, base: QuantizedBase, *, store: Store) -> tuple[dict[str, Tensor], int, list[str]]:
    """Return a file's tensors as they are stored, the number that were quantized, and the other matrices of layers."""
    tensors: dict[str, Tensor] = {}
    count, plain = 0, []
    for name, tensor in _tensors(path):
        shapes = base.stored(name)
        if shapes is None:
            tensors[name] = tensor
            if tensor.ndim == 2 and name.endswith(".weight") and base.layer.search(name):
                plain.append(name.removesuffix(".weight"))
            continue
        tensors |= store(name.removesuffix(".weight"), tensor, shapes)
        count += 1
    return tensors, count, plain


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
            yield name, file.get_tensor(name)


def _kind(name: str) -> str:
    """Return a name with * for the numbers of experts: every number but the first, which is the layer's."""
    parts, numbers = name.split("."), 0
    for place, part in enumerate(parts):
        if part.isdigit():
            numbers += 1
            parts[place] = "*" if numbers > 1 else part
    return ".".join(parts)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
