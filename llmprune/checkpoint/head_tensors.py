"""Find the tensors of prediction heads (multi-token prediction) in a base's files, and the layers that they repeat.

DeepSeek-V3 and GLM-4.5 append a head's layer to the decoder's (``model.layers.61``), Qwen3-Next and others store it as
``mtp.layers.0``. transformers loads neither with the model. Inside a head is a layer like those of the decoder (arXiv
2412.19437, section 2.2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.weight_headers import DTYPES, Headers

_HEAD = re.compile(r"(^|_)(mtp|nextn|medusa|eagle)(_|$)")  # a part of a tensor's name
Shapes = frozenset[tuple[str, tuple[int, ...]]]  # of the tensors in a layer, by their names in it


@dataclass(frozen=True)
class HeadLayer:
    """A layer of a head that is built like one of the decoder.

    ``names``: of its tensors in the files, which begin with ``prefix``; ``template``: index of the decoder's layer,
    whose tensors begin with ``template_prefix``.
    """

    names: frozenset[str]
    prefix: str
    template: int
    template_prefix: str


@dataclass(frozen=True)
class HeadTensors:
    """Tensors of prediction heads in the files of a model with ``layers`` decoder layers in the list ``list_name``."""

    names: tuple[str, ...]
    headers: Headers
    list_name: str
    layers: int

    def renamed(self, name: str, layers: int) -> str:
        """Return a name in a model with another number of layers: an appended layer follows the last one."""
        parts = name.split(".")
        place = _appended(parts, self.list_name, layers=self.layers)
        if place is not None:
            parts[place] = str(int(parts[place]) - self.layers + layers)
        return ".".join(parts)

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(self.headers[name].shape) * _itemsize(self.headers[name].dtype) for name in self.names)

    @property
    def is_quantised(self) -> bool:
        """Check that some weights are stored in a type of fewer bits."""
        return any(self.headers[name].floating is None for name in self.names)

    def layers_like(self, names: FileNames) -> list[HeadLayer]:
        """Return the heads' layers that have the tensors and shapes of a decoder layer, of the last one like it."""
        kinds: dict[Shapes, tuple[int, str]] = {}
        for index, prefix, shapes in _stored_layers(names, self.list_name):
            kinds[shapes] = (index, prefix)
        shapes_of = {name: tuple(self.headers[name].shape) for name in self.names}
        found: list[HeadLayer] = []
        for kind, (index, prefix) in sorted(kinds.items(), key=lambda item: -len(item[0])):
            for place in _places_of(kind, shapes_of):
                claimed = frozenset(place + suffix for suffix, _ in kind)
                if not any(claimed & other.names for other in found):
                    found.append(HeadLayer(claimed, place, index, prefix))
        return found


def find_head_tensors(names: FileNames) -> HeadTensors | None:
    """Return the heads' tensors among those of the files that transformers ignores; None where there are none."""
    path, layers = find_layers(names.model)
    list_name = path.rpartition(".")[-1]
    found = [name for name in names.ignored() if _is_of_head(name, list_name, layers=len(layers))]
    return HeadTensors(tuple(found), names.headers, list_name, len(layers)) if found else None


def _is_of_head(name: str, list_name: str, *, layers: int) -> bool:
    parts = name.split(".")
    return any(map(_HEAD.search, parts)) or _appended(parts, list_name, layers=layers) is not None


def _appended(parts: list[str], list_name: str, *, layers: int) -> int | None:
    """Return the place of the index in the name of a layer that follows the decoder's last one; else None."""
    place = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    if place and parts[place - 1] == list_name and int(parts[place]) >= layers:
        return None if any(map(_HEAD.search, parts[:place])) else place
    return None


def _stored_layers(names: FileNames, list_name: str) -> Iterator[tuple[int, str, Shapes]]:
    """Yield index, prefix in the files, and shapes of the stored tensors of each decoder layer."""
    path, layers = find_layers(names.model)
    for index, layer in enumerate(layers):
        sources = {source for name in layer.state_dict() for source in names.sources(f"{path}.{index}.{name}")}
        first = next(iter(sources), "")
        before, inner, _ = f".{first}".partition(f".{list_name}.{index}.")
        prefix = (before + inner).removeprefix(".")
        if inner and all(source.startswith(prefix) for source in sources):
            yield (
                index,
                prefix,
                frozenset((source.removeprefix(prefix), tuple(names.headers[source].shape)) for source in sources),
            )


def _places_of(kind: Shapes, shapes_of: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the prefixes under which heads have all tensors of a layer, in their shapes."""
    longest = max((suffix for suffix, _ in kind), key=len)
    prefixes = (name.removesuffix(longest) for name in shapes_of if name.endswith(f".{longest}"))
    return [prefix for prefix in prefixes if all(shapes_of.get(prefix + suffix) == shape for suffix, shape in kind)]


def others_of(names: Iterable[str], layers: Iterable[HeadLayer]) -> list[str]:
    """Return the names that are in none of the layers."""
    claimed = frozenset[str]().union(*(layer.names for layer in layers))
    return [name for name in names if name not in claimed]


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1
