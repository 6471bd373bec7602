"""Tools that take a model's shape: tensor and expert parallelism, quantisers in groups or blocks, k-quants."""

from __future__ import annotations

from llmprune.results.figures.base import Figures


class Degrees(Figures):
    """Numbers of GPUs, of 1, 2, 4, 8 and 16, that a shape allows. ``lost``: those that only the dense model allows."""

    allowed: tuple[int, ...]
    lost: tuple[int, ...]


class Rows(Figures):
    """Weight matrices whose rows are no whole number of blocks, with the length of a row, by their name in the layer.

    ``lost``: those whose rows in the dense model are.
    """

    broken: dict[str, int]
    lost: dict[str, int]


class NextTools(Figures):
    """Tools that a pruned model's shape allows, and those that it lost against the dense model.

    ``vocabulary``: GPUs that get equal parts of it; vLLM pads any other. ``groups``: by the number of inputs that share
    a scale (GPTQ, AWQ); ``fp8_blocks``: blocks of 128 × 128; both with the degrees of tensor parallelism at which no
    group or block is split. ``k_quants``: of llama.cpp, with blocks of 256 in a row.
    """

    tensor_parallel: Degrees
    expert_parallel: Degrees | None  # None without experts
    vocabulary: Degrees
    groups: dict[int, Degrees]
    fp8_blocks: Degrees
    k_quants: Rows
