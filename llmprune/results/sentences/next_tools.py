"""Clauses about the tools that a model's shape allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from llmprune.results.figures.next_tools import Degrees, NextTools, Rows


def describe_next_tools(found: NextTools) -> list[str]:
    """Return a clause for parallelism, one for quantisers, and one for k-quants."""
    parallel = f"tensor parallelism {_gpus(found.tensor_parallel)}"
    if found.expert_parallel is not None:
        parallel += f"; expert parallelism {_gpus(found.expert_parallel)}"
    return [
        parallel,
        f"quantisation in {_groups(found.groups)}; in FP8 blocks of 128 {_gpus(found.fp8_blocks)}",
        f"k-quants of llama.cpp for {_k_quants(found.k_quants)}",
    ]


def degrees(numbers: Sequence[int]) -> str:
    """Return ``1, 2 or 4``."""
    first, last = ", ".join(map(str, numbers[:-1])), str(numbers[-1])
    return f"{first} or {last}" if first else last


def _gpus(found: Degrees) -> str:
    """Return ``on 1, 2 or 4 GPUs (lost: 8)``."""
    allowed = "not at all" if not found.allowed else f"on {degrees(found.allowed)} GPU{'s' * (found.allowed != (1,))}"
    return f"{allowed} (lost: {degrees(found.lost)})" if found.lost else allowed


def _groups(found: Mapping[int, Degrees]) -> str:
    """Return ``groups of 32 or 64 on 1 or 2 GPUs; of 128 not at all``."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for size, allowed in found.items():
        sizes[_gpus(allowed)].append(size)
    return "groups " + "; ".join(f"of {degrees(some)} {gpus}" for gpus, some in sizes.items())


def _k_quants(rows: Rows) -> str:
    """Return ``all matrices but a_proj, b_proj (576 in a row); c_proj (1,152 in a row, lost)``."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, length in rows.broken.items():
        names[f"{length:,} in a row{', lost' if name in rows.lost else ''}"].append(name)
    listed = "; ".join(f"{', '.join(some)} ({length})" for length, some in names.items())
    return f"all matrices but {listed}" if listed else "all matrices"
