"""Merge the tensors of single experts in the files into one tensor of the model, copied from the files once.

transformers' rules stack the experts' tensors of every source pattern and then concatenate the stacks, which takes
twice the memory of the result. Here every tensor is copied to its place in the result.

Shapes: E experts, X the shape of one expert's tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from llmprune.common.process_memory import empty_outside_heap

Groups = Sequence[Sequence[Tensor]]  # for each source pattern of a rule, in its order, the tensors that matched it


def groups_to_merge(rule: WeightConverter, parts: Iterable[tuple[str, Tensor]]) -> Groups | None:
    """Return a rule's tensors by source pattern if it only stacks them and concatenates the stacks; None otherwise.

    ``parts``: each tensor, in the order in which it is stacked, with the pattern that it matched.
    """
    found: dict[str, list[Tensor]] = {pattern: [] for pattern in rule.source_patterns}
    for pattern, tensor in parts:
        found[pattern].append(tensor)
    groups = [group for group in found.values() if group]
    return groups if only_stacks(rule, groups) else None


def only_stacks(rule: WeightConverter, groups: Groups) -> bool:
    """Check that a rule only stacks the tensors of each group and concatenates the stacks."""
    kinds = [type(operation) for operation in rule.operations]
    expected = [MergeModulelist] if len(groups) == 1 else [MergeModulelist, Concatenate]
    plain = kinds == expected and len(rule.target_patterns) == 1 and rule.operations[0].dim == 0
    alike = all(len({tensor.shape for tensor in group}) == 1 for group in groups)
    return plain and alike and _fit(rule, groups)


def _fit(rule: WeightConverter, groups: Groups) -> bool:
    """Check that the stacks differ only in the dimension that they are concatenated in: files may lack a tensor."""
    shapes, dim = [(len(group), *group[0].shape) for group in groups], _dim(rule, groups)
    return len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) == 1


def _dim(rule: WeightConverter, groups: Groups) -> int:
    dim: int = rule.operations[1].dim if len(groups) > 1 else 0
    return dim


def merge(rule: WeightConverter, groups: Groups, *, dtype: torch.dtype) -> Tensor:
    """Return the stacks [E, X] of all groups, concatenated as the rule says, in a type."""
    dim = _dim(rule, groups)
    shapes = [[len(group), *group[0].shape] for group in groups]
    sizes = [shape[dim] for shape in shapes]
    shape = shapes[0]
    shape[dim] = sum(sizes)
    merged = empty_outside_heap(shape, dtype)
    for block, group in zip(torch.split(merged, sizes, dim), groups, strict=True):
        _fill(block, group)
    return merged


def _fill(block_EX: Tensor, group: Sequence[Tensor]) -> None:
    for target_X, tensor_X in zip(block_EX, group, strict=True):
        target_X.copy_(tensor_X)
