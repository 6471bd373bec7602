"""Read a model from its weights files by parts: one decoder layer, or all tensors outside the layers."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.file_names import Tensors
from llmprune.checkpoint.weights_reader import WeightsReader


class LayersInFiles:
    """The layers of a model in its weights files."""

    def __init__(self, skeleton: PreTrainedModel, reader: WeightsReader) -> None:
        self._model = skeleton
        self.path, self._layers = find_layers(skeleton)
        self._reader = reader
        self._dtypes = reader.names.compute_dtypes(skeleton.dtype)

    def read(self, index: int) -> Tensors:
        """Return the tensors of a layer by their names in it; buffers that no file has are the model's own."""
        prefix = f"{self.path}.{index}."
        own = self._layers[index].state_dict()
        found = self._read(prefix + name for name in own)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        return {name: tensors.get(name, value) for name, value in own.items()}

    def prefetch(self, index: int) -> None:
        """Bring the files' pages with a layer's tensors from the disk into the page cache."""
        prefix = f"{self.path}.{index}."
        self._reader.prefetch(prefix + name for name in self._layers[index].state_dict())

    def read_rest(self) -> Tensors:
        """Return all tensors outside the layers that the files have."""
        return self._read(name for name in self._dtypes if not name.startswith(f"{self.path}."))

    def absent(self, rest: Tensors) -> list[str]:
        """Return the tensors outside the layers that are not among ``rest``: tied ones, and those of no file."""
        return [name for name in self._model.state_dict() if name not in rest and not name.startswith(f"{self.path}.")]

    def _read(self, names: Iterable[str]) -> Tensors:
        return self._reader.read(filter(self._reader.names.has, names), dtypes=self._dtypes)
