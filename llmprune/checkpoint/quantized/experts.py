"""Dequantize the experts of a mixture one at a time, so that no second copy of a layer's experts is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import overload

from torch import Tensor
from transformers.core_model_loading import WeightConverter

Names = Sequence[str]  # of the tensors in the files, by expert


class DequantizedExperts(Sequence[Tensor]):
    """Weights of experts, each dequantized when it is taken.

    ``dequantize``: makes one weight from its stored tensors by pattern; ``names``: of these by pattern; ``tensor_of``:
    reads a tensor of the files.
    """

    def __init__(
        self,
        dequantize: Callable[[dict[str, list[Tensor]]], Tensor],
        names: Mapping[str, Names],
        *,
        tensor_of: Callable[[str], Tensor],
    ) -> None:
        self._dequantize, self._names, self._tensor_of = dequantize, names, tensor_of

    def __len__(self) -> int:
        return min(map(len, self._names.values()))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        stored = {pattern: [self._tensor_of(names[index])] for pattern, names in self._names.items()}
        return self._dequantize(stored)


def experts_by_weight(own: WeightConverter, stored: Mapping[str, Names]) -> dict[str, dict[str, Names]] | None:
    """Return, for each source pattern of a model's own rule, the stored tensors of its weights by pattern.

    None where a pattern belongs to no source of the rule.
    """
    found: dict[str, dict[str, Names]] = {pattern: {} for pattern in own.source_patterns}
    for pattern, names in stored.items():
        prefixes = {weight.rpartition(".")[0] + ".": weight for weight in found}
        weight = next((weight for prefix, weight in prefixes.items() if pattern.startswith(prefix)), None)
        if weight is None:
            return None
        found[weight][pattern] = names
    return {weight: parts for weight, parts in found.items() if parts}
