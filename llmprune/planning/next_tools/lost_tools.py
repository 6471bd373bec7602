"""Notes on the tools that a planned shape loses against the dense model, with the nearest sizes that keep them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    remedy = _Remedy(dense, pruned)
    return [
        *_about_parallelism(found, remedy),
        *_about_quantisers(found, remedy),
        *_about_k_quants(found, remedy),
    ]


class _Remedy:
    """The nearest sizes that keep a tool. ``dense``, ``pruned``: sizes before and after the cut."""

    def __init__(self, dense: ToolSizes, pruned: ToolSizes) -> None:
        self._dense, self._pruned = dense, pruned

    def sentence(self, keeps: Keeps) -> str:
        """Return ``; width.neurons 1280 or 1536 would keep it``, with each size that loses the tool by itself."""
        dense, pruned = self._dense, self._pruned
        several = len(dense.widths) > 1
        found = [
            _nearest(
                f"width.neurons.{field}" if several else "width.neurons",
                now=pruned.widths[field],
                most=width,
                keeps=partial(self._keeps_width, field=field, keeps=keeps),
            )
            for field, width in dense.widths.items()
        ]
        if pruned.kv_groups is not None and dense.kv_groups is not None:
            found.append(
                _nearest(
                    "width.heads",
                    now=pruned.kv_groups,
                    most=dense.kv_groups,
                    keeps=lambda value: keeps(replace(dense, kv_groups=value)),
                )
            )
        if pruned.experts is not None and dense.experts is not None:
            found.append(
                _nearest(
                    "experts.keep",
                    now=pruned.experts,
                    most=dense.experts,
                    keeps=lambda value: keeps(replace(dense, experts=value)),
                )
            )
        listed = " and ".join(filter(None, found))
        return f"; {listed} would keep it" if listed else ""

    def _keeps_width(self, value: int, *, field: str, keeps: Keeps) -> bool:
        return keeps(replace(self._dense, widths={**self._dense.widths, field: value}))


def _nearest(key: str, *, now: int, most: int, keeps: Callable[[int], bool]) -> str:
    """Return the key with the nearest sizes below and above; nothing where this size loses nothing by itself."""
    if keeps(now):
        return ""
    below = next((value for value in range(now - 1, 0, -1) if keeps(value)), None)
    above = next((value for value in range(now + 1, most + 1) if keeps(value)), None)
    values = [value for value in (below, above) if value is not None]
    return f"{key} {degrees(values)}" if values else ""


def _about_parallelism(found: NextTools, remedy: _Remedy) -> list[str]:
    notes = []
    if lost := found.tensor_parallel.lost:
        nearest = remedy.sentence(lambda sizes: all(map(sizes.tensor_parallel, lost)))
        notes.append(
            f"tensor parallelism on {degrees(lost)} GPUs, which the dense model allows, is lost: heads or neurons do "
            f"not divide into equal parts{nearest}"
        )
    if found.expert_parallel and (gone := found.expert_parallel.lost):
        nearest = remedy.sentence(lambda sizes: all(map(sizes.expert_parallel, gone)))
        notes.append(
            f"expert parallelism on {degrees(gone)} GPUs, which the dense model allows, is lost: the experts do not "
            f"divide into equal parts{nearest}"
        )
    return notes


def _about_vocabulary(found: NextTools) -> list[str]:
    if not found.vocabulary.lost:
        return []
    return [
        f"the vocabulary no longer divides into equal parts on {degrees(found.vocabulary.lost)} GPUs: vLLM pads it, "
        f"other tools may refuse it; vocabulary.multiple {max(found.vocabulary.lost)} would keep it"
    ]


def _about_quantisers(found: NextTools, remedy: _Remedy) -> list[str]:
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
        f"would be split ({listed} GPUs){remedy.sentence(keeps)}"
    ]


def _about_k_quants(found: NextTools, remedy: _Remedy) -> list[str]:
    lost = found.k_quants.lost
    if not lost:
        return []
    listed = ", ".join(f"{name} ({length:,} in a row)" for name, length in lost.items())
    nearest = remedy.sentence(lambda sizes: not lost.keys() & sizes.broken_rows().keys())
    return [
        f"llama.cpp's k-quants, whose rows are multiples of 256, are lost for {listed}: Q4_K_M stores these in Q5_0 or "
        f"Q8_0, so that its file shrinks little or not at all{nearest}"
    ]
