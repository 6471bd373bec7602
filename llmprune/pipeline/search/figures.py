"""Composition of the figures of a search from the cuts that it tried."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmprune.cut.decision import Cut
from llmprune.cut.layer_choice import layers_in_group
from llmprune.cut.shape import Shape
from llmprune.pipeline.context import RunContext
from llmprune.planning.budget.candidates import Candidates
from llmprune.planning.budget.limits import SpeedOf
from llmprune.planning.budget.space import SearchSpace
from llmprune.recipe.search_schedule import Schedule
from llmprune.results.figures.search import REPEATED, ChosenShape, SearchFigures, TriedShape
from llmprune.results.run_folder.folder import RunFolder
from llmprune.results.run_folder.products import SEARCH_SO_FAR
from llmprune.search.rounds import Tried


@dataclass(frozen=True)
class SearchedMember:
    """Search for one budget: its candidates, the tried cuts, best first, and by axis those one step beyond."""

    number: int
    budget: Candidates
    tried: tuple[Tried, ...]
    further: Mapping[str, Tried] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchRecord:
    """Facts about a search. ``order``: of the removal of layers; ``speed``: predicts that of a shape, if asked for."""

    context: RunContext
    space: SearchSpace
    order: tuple[int, ...]
    schedule: Schedule
    speed: SpeedOf | None
    since: float = field(default_factory=time.monotonic)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that shapes are judged on."""
        inputs = self.context.inputs
        if inputs.sources is None or self.context.search is None:
            return ("text", REPEATED)
        numbers = sorted(set(inputs.sources[self.context.search.judged_N].tolist()))
        return (*(inputs.texts.source_names[number] for number in numbers), REPEATED)


def shape_of(cut: Cut, space: SearchSpace) -> Shape:
    """Return the shape of a cut of the space's model."""
    dense = space.dense
    widths = tuple((field, cut.widths.get(field, width)) for field, width in dense.widths)
    kv_groups, experts = cut.kv_groups or dense.kv_groups, cut.num_experts or dense.experts
    return Shape(len(cut.layers), widths, kv_groups, experts, space.tokens)


def shape_of_tried(found: SearchFigures, tried: TriedShape) -> Shape:
    """Return the shape that a search tried."""
    widths = tuple(sorted(tried.widths.items()))
    return Shape(tried.layers, widths, tried.kv_groups, tried.experts, found.vocabulary)


@dataclass(frozen=True)
class Progress:
    """Figures of a search, which are written to the run folder after every round."""

    record: SearchRecord
    folder: RunFolder
    _members: dict[int, SearchedMember] = field(default_factory=dict)

    def note(self, member: SearchedMember) -> None:
        """Record the shapes of a budget after one of its rounds."""
        self._members[member.number] = member
        self.folder.write(SEARCH_SO_FAR, self.figures(is_done=False).model_dump_json() + "\n")

    def figures(self, *, is_done: bool) -> SearchFigures:
        """Return the figures. ``is_done``: a shape is chosen for every budget."""
        return compose_figures(self.record, list(self._members.values()), is_done=is_done)


def compose_figures(record: SearchRecord, members: Sequence[SearchedMember], *, is_done: bool) -> SearchFigures:
    """Return the figures of a search for one or several budgets. ``is_done``: it has chosen a shape for each."""
    schedule, dense, whole = record.schedule, record.space.dense_sizes, record.space.dense
    tried = [_tried(record, one, member=member) for member in members for one in member.tried]
    beyond = [
        _tried(record, one, member=member, further=axis) for member in members for axis, one in member.further.items()
    ]
    numbers, recipe = [len(member.tried) for member in members], record.context.recipe
    refit = schedule.repair_of(recipe.refit)
    passes = schedule.forward_passes(numbers, further=len(beyond), refit=refit)
    removals = len(record.order) // layers_in_group(record.space.anatomy)
    passes += schedule.order_passes(whole.layers, removed=removals)
    return SearchFigures(
        dense_parameters=dense.parameters,
        dense_bytes=dense.bytes,
        dense_layers=whole.layers,
        dense_widths=whole.neurons,
        dense_kv_groups=whole.kv_groups,
        dense_experts=whole.experts,
        vocabulary=record.space.tokens,
        tried=(*tried, *beyond),
        chosen=tuple(_chosen(record, member) for member in (members if is_done else ())),
        order=record.order,
        sources=record.sources,
        windows=schedule.judged + schedule.repeated,
        tokens=(schedule.judged + schedule.repeated) * schedule.judged_tokens,
        forward_passes=round(passes, 2),
        seconds=round(time.monotonic() - record.since, 1),
    )


def _chosen(record: SearchRecord, member: SearchedMember) -> ChosenShape:
    """Return the choice for a budget."""
    shape = shape_of(member.tried[0].cut, record.space)
    return ChosenShape(
        name=shape.name,
        limits=dict(member.budget.limits),
        candidates=len(member.budget.found),
        tried=len(member.tried),
    )


def _tried(record: SearchRecord, tried: Tried, *, member: SearchedMember, further: str | None = None) -> TriedShape:
    """Return the figures of a shape that was tried for a budget."""
    shape = shape_of(tried.cut, record.space)
    sizes = record.space.counter.sizes(shape, layers=tried.cut.layers)
    return TriedShape(
        name=shape.name,
        layers=shape.layers,
        removed=tried.cut.removed,
        widths=shape.neurons,
        kv_groups=shape.kv_groups,
        experts=shape.experts,
        parameters=sizes.parameters,
        active_parameters=sizes.active_parameters,
        bytes=sizes.bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        speed=record.speed(shape) if record.speed else None,
        divergence=dict(zip(record.sources, tried.divergence, strict=True)),
        score=tried.scores[-1],
        scores=tried.scores,
        repaired=len(tried.rounds) > 1,
        broken=None if tried.broken is None else record.sources[tried.broken],
        size=member.number,
        further=further,
    )
