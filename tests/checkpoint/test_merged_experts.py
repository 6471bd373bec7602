"""Tensors of single experts merged into one: the results of transformers' rules, and which rules are merged so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, Transpose, WeightConverter

from llmprune.checkpoint.merged_experts import groups_to_merge, merge

NAME = "mlp.experts.merged"
GATE, UP = "mlp.experts.*.gate.weight", "mlp.experts.*.up.weight"


def _parts(*patterns: str, rows: int = 3) -> list[tuple[str, Tensor]]:
    """Random tensors of four experts for each pattern."""
    return [(pattern, torch.randn(rows, 5).bfloat16()) for pattern in patterns for _ in range(4)]


def _rule(patterns: list[str], *operations: ConversionOps) -> WeightConverter:
    return WeightConverter(patterns, [NAME], list(operations))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("patterns", "operations"),
    [
        ([GATE], [MergeModulelist(0)]),
        ([GATE, UP], [MergeModulelist(0), Concatenate(1)]),
        ([GATE, UP], [MergeModulelist(0), Concatenate(2)]),
        ([GATE, UP], [MergeModulelist(0), Concatenate(0)]),
    ],
)
def test_merged_tensors_equal_those_of_transformers(
    patterns: list[str], operations: list[ConversionOps], dtype: torch.dtype
) -> None:
    """Values and shapes are the same to the bit, whatever the order in which the files have the patterns."""
    parts, rule = _parts(*reversed(patterns)), _rule(patterns, *operations)
    groups = groups_to_merge(rule, parts)
    assert groups is not None
    merged = merge(rule, groups, dtype=dtype)
    for number, (pattern, tensor) in enumerate(parts):
        rule.add_tensor(NAME, f"source {number}", pattern, tensor.to(dtype))
    expected = rule.convert(NAME)[NAME]
    assert merged.dtype == dtype
    assert torch.equal(merged, expected)


def test_other_rules_are_left_to_transformers() -> None:
    """Transposed tensors, another dimension of the stack, and experts that differ or are missing in the files."""
    stacked, parts = MergeModulelist(0), _parts(GATE, UP)
    assert groups_to_merge(_rule([GATE, UP], stacked, Concatenate(1), Transpose(1, 2)), parts) is None
    assert groups_to_merge(_rule([GATE], MergeModulelist(1)), _parts(GATE)) is None
    assert groups_to_merge(_rule([GATE], stacked), [*_parts(GATE), *_parts(GATE, rows=2)]) is None
    both = _rule([GATE, UP], stacked, Concatenate(1))
    assert groups_to_merge(both, _parts(GATE)) is None
    assert groups_to_merge(both, parts[:-1]) is None
    narrow = [(UP, tensor[:, :1]) for _, tensor in _parts(UP)]
    assert groups_to_merge(both, [*_parts(GATE), *narrow]) is None
