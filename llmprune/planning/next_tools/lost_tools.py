"""Notes on the tools that a planned shape loses against the dense model, with the nearest sizes that keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmprune.planning.base import Base
from llmprune.planning.next_tools.tool_sizes import (
    FP8_BLOCK,
    GROUPS,
    ToolSizes,
    cut_sizes,
    next_tools,
    sizes_for_tools,
    with_tokens,
)
from llmprune.planning.plan_schema import Plan
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.planning.vocabulary.plan import VocabularyPlan
from llmprune.results.figures.next_tools import NextTools
from llmprune.results.sentences.next_tools import degrees

Keeps = Callable[[ToolSizes], bool]


def with_next_tools(plan: Plan, base: Base, *, planned: PlannedCut) -> Plan:
    """Return a plan with the tools that its shape allows, and a sentence on each that it loses."""
    dense = sizes_for_tools(base.dense, base.anatomy)
    pruned = cut_sizes(dense, planned.sizes)
    found = next_tools(dense, pruned)
    lost = about_lost_tools(found, dense=dense, pruned=pruned)
    return plan.model_copy(update={"next_tools": found, "lost_tools": tuple(lost)})


def with_tokens_kept(plan: Plan, vocabulary: VocabularyPlan) -> Plan:
    """Return a plan, made for all tokens, with the tools that the number of tokens kept allows."""
    if plan.next_tools is None or vocabulary.kept is None:
        return plan
    found = with_tokens(plan.next_tools, dense=vocabulary.tokens, kept=vocabulary.kept)
    lost = (*plan.lost_tools, *_about_vocabulary(found))
    return plan.model_copy(update={"next_tools": found, "lost_tools": lost})


def about_lost_tools(found: NextTools, *, dense: ToolSizes, pruned: ToolSizes) -> list[str]:
    """Return a note for parallelism, for quantisation in groups and for k-quants, if lost."""
    dimensions = _dimensions(dense, pruned)
    return [
        *_about_parallelism(found, dimensions),
        *_about_quantisers(found, dimensions),
        *_about_k_quants(found, dimensions),
    ]


@dataclass(frozen=True)
class _Dimension:
    """A size that a recipe sets, before and after the cut. ``resized``: returns the dense sizes with another value."""

    key: str  # of the recipe
    dense: int
    pruned: int
    resized: Callable[[int], ToolSizes]


def _dimensions(dense: ToolSizes, pruned: ToolSizes) -> list[_Dimension]:
    key = "width.neurons" if len(dense.widths) == 1 else "width.neurons.{}"
    found: list[tuple[str, int | None, int | None, Callable[[int], ToolSizes]]] = [
        ("width.heads", dense.kv_groups, pruned.kv_groups, lambda value: replace(dense, kv_groups=value)),
        ("experts.keep", dense.experts, pruned.experts, lambda value: replace(dense, experts=value)),
    ]
    widths = [
        _Dimension(key.format(field), width, pruned.widths[field], partial(_with_width, dense, field=field))
        for field, width in dense.widths.items()
    ]
    counts = [
        _Dimension(key, before, after, resized)
        for key, before, after, resized in found
        if before is not None and after is not None
    ]
    return [*widths, *counts]


def _with_width(sizes: ToolSizes, value: int, *, field: str) -> ToolSizes:
    return replace(sizes, widths={**sizes.widths, field: value})


def _remedy(dimensions: Sequence[_Dimension], keeps: Keeps) -> str:
    """Return ``; width.neurons 1280 or 1536 would keep it``, with each size that loses the tool by itself."""
    listed = " and ".join(filter(None, (_nearest(one, keeps) for one in dimensions)))
    return f"; {listed} would keep it" if listed else ""


def _nearest(dimension: _Dimension, keeps: Keeps) -> str:
    """Return the key with the nearest sizes below and above; nothing where this size loses nothing by itself."""

    def fits(value: int) -> bool:
        return keeps(dimension.resized(value))

    now = dimension.pruned
    if fits(now):
        return ""
    below = next(filter(fits, range(now - 1, 0, -1)), None)
    above = next(filter(fits, range(now + 1, dimension.dense + 1)), None)
    values = [value for value in (below, above) if value is not None]
    return f"{dimension.key} {degrees(values)}" if values else ""


def _about_parallelism(found: NextTools, dimensions: Sequence[_Dimension]) -> list[str]:
    kinds = (
        ("tensor", found.tensor_parallel, ToolSizes.tensor_parallel, "heads or neurons"),
        ("expert", found.expert_parallel, ToolSizes.expert_parallel, "the experts"),
    )
    notes = []
    for kind, gpus, allows, parts in kinds:
        if gpus is not None and gpus.lost:
            nearest = _remedy(dimensions, partial(_allows_all, allows=allows, numbers=gpus.lost))
            notes.append(
                f"{kind} parallelism on {degrees(gpus.lost)} GPUs, which the dense model allows, is lost: {parts} do "
                f"not divide into equal parts{nearest}"
            )
    return notes


def _allows_all(sizes: ToolSizes, *, allows: Callable[[ToolSizes, int], bool], numbers: Sequence[int]) -> bool:
    return all(allows(sizes, number) for number in numbers)


def _about_vocabulary(found: NextTools) -> list[str]:
    if not found.vocabulary.lost:
        return []
    return [
        f"the vocabulary no longer divides into equal parts on {degrees(found.vocabulary.lost)} GPUs: vLLM pads it, "
        f"other tools may refuse it; vocabulary.multiple {max(found.vocabulary.lost)} would keep it"
    ]


def _about_quantisers(found: NextTools, dimensions: Sequence[_Dimension]) -> list[str]:
    """Return a note on groups and blocks that are split, where that is not because parallelism is lost altogether."""
    gone = set(found.tensor_parallel.lost)
    groups = {size: [one for one in found.groups[size].lost if one not in gone] for size in GROUPS}
    blocks = [one for one in found.fp8_blocks.lost if one not in gone]
    lost = {f"groups of {size}": numbers for size, numbers in groups.items()} | {f"FP8 blocks of {FP8_BLOCK}": blocks}
    listed = ", ".join(f"{name} on {degrees(numbers)}" for name, numbers in lost.items() if numbers)
    if not listed:
        return []

    def keeps(sizes: ToolSizes) -> bool:
        whole = all(sizes.grouped(size, one) for size, numbers in groups.items() for one in numbers)
        return whole and all(map(sizes.in_blocks, blocks))

    return [
        "quantised, the model does not divide over as many GPUs as the dense one, because groups or blocks of weights "
        f"would be split ({listed} GPUs){_remedy(dimensions, keeps)}"
    ]


def _about_k_quants(found: NextTools, dimensions: Sequence[_Dimension]) -> list[str]:
    lost = found.k_quants.lost
    if not lost:
        return []
    listed = ", ".join(f"{name} ({length:,} in a row)" for name, length in lost.items())
    nearest = _remedy(dimensions, lambda sizes: not lost.keys() & sizes.broken_rows().keys())
    return [
        f"llama.cpp's k-quants, whose rows are multiples of 256, are lost for {listed}: Q4_K_M stores these in Q5_0 or "
        f"Q8_0, so that its file shrinks little or not at all{nearest}"
    ]
