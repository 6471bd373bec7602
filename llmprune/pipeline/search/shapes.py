"""Search of a run with a budget: score every axis once, then try the shapes that meet the budget.

Products in the run folder: scores as of any run, the order in which layers are removed, and ``search.json``. Every
single trial is kept until the search is done, so that one that is stopped continues.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from llmprune.checkpoint.loading import load_config
from llmprune.common.distributed import is_first_process
from llmprune.criteria.depth.divergence import Divergence
from llmprune.cut.decision import Cut
from llmprune.cut.layer_choice import layers_in_group, may_be_left
from llmprune.cut.shape import Shape
from llmprune.pipeline.context import RunContext, Search
from llmprune.pipeline.score_and_select import find_scores, origin_of_scores
from llmprune.pipeline.scored_sizes import criteria_of
from llmprune.pipeline.search.figures import Progress, SearchedMember, SearchRecord, shape_of, shape_of_tried
from llmprune.pipeline.search.speed import ShapeSpeeds
from llmprune.pipeline.search.windows import (
    judged_windows,
    judging_batches,
    order_batches,
    repair_windows,
    schedule_of,
)
from llmprune.pipeline.step_costs import measure_step
from llmprune.planning.base import describe_base
from llmprune.planning.budget.candidates import Candidates, candidates, one_step_further
from llmprune.planning.budget.cost import removals
from llmprune.planning.budget.limits import SpeedOf
from llmprune.planning.budget.settle import settled
from llmprune.planning.budget.space import SearchSpace, search_space
from llmprune.recipe.refit import Refit
from llmprune.recipe.search_schedule import TRIED_LAYERS, Schedule
from llmprune.report.html.frontier_page import render_frontier
from llmprune.results.figures.search import SearchFigures
from llmprune.results.run_folder.fingerprints import fingerprint
from llmprune.results.run_folder.products import (
    FRONTIER,
    HIDDEN_STATES,
    LAYER_ORDER,
    SEARCH,
    SEARCH_SO_FAR,
    SEARCH_TRIALS,
)
from llmprune.results.run_folder.replacing import remove
from llmprune.score.ablation import AblatedModels
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.search.judging import Judge
from llmprune.search.layer_order import removal_order, score_order
from llmprune.search.rounds import Rounds, Tried
from llmprune.search.trials import Trials

logger = logging.getLogger(__name__)


def search_space_of(context: RunContext) -> SearchSpace:
    """Return the shapes that the recipe's budget can have. Raises RecipeError as the plan does."""
    recipe, chosen = context.recipe, context.inputs.texts.vocabulary
    base = describe_base(recipe, load_config(recipe.model))
    return search_space(recipe, base, tokens=None if chosen is None else len(chosen.keep_K))


def search_shapes(context: RunContext, space: SearchSpace, *, known: SearchFigures | None = None) -> Search:
    """Score every axis and find the best shape for each budget of the recipe, or take what the run folder has.

    ``known``: figures of a published run's search for the same budget, whose choice is taken where it is a shape of the
    space. Every process calls this, after the windows that the dense model writes were added. Raises NumericalError
    where no layer can be left out.
    """
    smallest = settled(context.recipe, space.smallest, anatomy=space.anatomy, removed=None)
    search = Search(criteria_of(smallest), judged_windows(context.inputs))
    scores = find_scores(replace(context, search=search))
    search = replace(search, scores=scores)
    if known is not None:
        if _is_chosen_from(space, known):
            return replace(search, figures=known, member=known.sizes[0])
        logger.warning("the recorded shape is none of this model's for this budget: the search is made anew")
    speeds = ShapeSpeeds.of(context)
    return replace(search, figures=_Step(replace(context, search=search), search, space, speeds).figures())


def _is_chosen_from(space: SearchSpace, found: SearchFigures) -> bool:
    """Check that recorded figures have a choice, and that it is a shape of the space."""
    try:
        chosen = found.chosen_shape(found.sizes[0])
        space.place(shape_of_tried(found, chosen))
    except (LookupError, StopIteration, ValueError):
        return False
    if found.vocabulary != space.tokens:
        return False
    lacking = space.dense.layers - chosen.layers
    return len(set(chosen.removed)) == lacking and set(chosen.removed) < set(range(space.dense.layers))


@dataclass(frozen=True)
class _Step:
    """The step of a run that tries shapes."""

    context: RunContext
    search: Search
    space: SearchSpace
    speeds: ShapeSpeeds | None  # where the budget has a speed

    def figures(self) -> SearchFigures:
        """Return the result of the search."""
        folder, inputs = self.context.folder, self.context.inputs

        def make(path: Path) -> SearchFigures:
            with measure_step(folder.steps, "search", decoder=inputs.dense):
                found = self.context.batches.calibration.run("search", self._search, release=inputs.evict)
            found = self.speeds.with_measured(found) if self.speeds else found
            folder.write(path.name, found.model_dump_json(indent=1) + "\n")
            folder.write(FRONTIER, render_frontier(found, self.context.recipe.model.id))
            if is_first_process():
                for name in (SEARCH_TRIALS, SEARCH_SO_FAR, HIDDEN_STATES):
                    remove(folder.path / name)
            return found

        order = self._order
        return folder.produce(
            "search", fingerprint(self._origin, order), file=SEARCH, load=SearchFigures.read, make=make, together=True
        )

    @cached_property
    def _origin(self) -> str:
        """Fingerprint of everything that the search depends on, but for the order of the layers."""
        recipe, inputs = self.context.recipe, self.context.inputs
        judged, scores = self.search.judged_N.tolist(), origin_of_scores(self.context)
        table = self.speeds and self.speeds.table.model_dump_json()
        parts = inputs.identity, inputs.windows_fingerprint, scores, judged, recipe.budget, self._refit, table
        tokens = () if self.space.tokens is None else (self.space.tokens,)
        return fingerprint(*parts, self._schedule.repairs, *tokens)

    @property
    def _refit(self) -> Refit | None:
        """The repair in closed form alone: layers are not trained for every shape that is tried. None: no repair."""
        refit = self._schedule.repair_of(self.context.recipe.refit)
        return refit and refit.model_copy(update={"block": False})

    @cached_property
    def _schedule(self) -> Schedule:
        return schedule_of(self.context.inputs)

    @property
    def _speed(self) -> SpeedOf | None:
        """Prediction of a shape's speed."""
        return self.speeds.predicted if self.speeds else None

    @cached_property
    def _budgets(self) -> tuple[Candidates, ...]:
        """Candidates for each budget."""
        return tuple(candidates(self.space, limits, speed=self._speed) for limits in self.space.members)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """Layers in the order of their removal, as many as the smallest shape lacks."""
        folder, inputs = self.context.folder, self.context.inputs
        fewest = min(one.shape.layers for budget in self._budgets for one in budget.tried)
        rounds = removals(self.space, fewest)
        if not rounds:
            return ()

        assert self.search.scores is not None, "layers that may be removed are scored"
        assert self.search.scores.layers is not None, "layers that may be removed are scored"
        scores_N, ordering = self.search.scores.layers, self._schedule.ordering
        judged = self.search.judged_N.tolist()
        may_keep, size = partial(may_be_left, self.space.anatomy), layers_in_group(self.space.anatomy)
        if self._schedule.quick:
            return score_order(scores_N, rounds=rounds, may_keep=may_keep, size=size)

        def make(path: Path) -> tuple[int, ...]:
            with measure_step(folder.steps, "layer order", decoder=inputs.dense):
                found = self.context.batches.calibration.run("layer order", find, release=inputs.evict)
            folder.write(path.name, json.dumps(found) + "\n")
            return found

        def find(batch_size: int) -> tuple[int, ...]:
            batches = order_batches(self.context, batch_size=batch_size)
            criterion = Divergence(windows=len(batches.windows_NL))
            costs = AblatedModels(inputs.dense, criterion, calibration=batches, title="layer order: leaving layers out")
            return removal_order(
                costs, layers=len(inputs.dense), rounds=rounds, tried=TRIED_LAYERS, may_keep=may_keep, size=size
            )

        return folder.produce(
            "layer order",
            fingerprint(
                inputs.identity,
                inputs.windows_fingerprint,
                judged,
                rounds,
                ordering,
            ),
            file=LAYER_ORDER,
            load=lambda path: tuple(json.loads(path.read_text(encoding="utf-8"))),
            make=make,
            together=True,
        )

    def _search(self, batch_size: int) -> SearchFigures:
        """Try the shapes of every budget; every process returns the same figures."""
        schedule, found = self._schedule, Progress(self._record, self.context.folder)
        rounds = self._rounds(schedule, batch_size)
        shapes = list(dict.fromkeys(one.shape for budget in self._budgets for one in budget.tried))
        first = dict(zip(shapes, rounds.first([self._cut(shape) for shape in shapes]), strict=True))
        for number, budget in enumerate(self._budgets):
            best: list[Tried] = []
            for best in rounds.halve([first[one.shape] for one in budget.tried], counts=schedule.rounds):
                found.note(SearchedMember(number, budget, tuple(best)))
            found.note(SearchedMember(number, budget, tuple(best), self._further(rounds, best[0])))
        return found.figures(is_done=True)

    def _rounds(self, schedule: Schedule, batch_size: int) -> Rounds:
        """Return the settings of the rounds."""
        context = self.context
        second, last = (repair_windows(context, number, batch_size=batch_size) for number in schedule.repairs)
        judge = Judge(context.inputs.dense, judging_batches(context, batch_size=batch_size))
        trials = Trials(context.folder.path / SEARCH_TRIALS, fingerprint(self._origin, self._order))
        return Rounds(judge, self.space.anatomy, self._refit, (second, last), trials)

    @property
    def _record(self) -> SearchRecord:
        return SearchRecord(self.context, self.space, self._order, self._schedule, self._speed)

    def _further(self, rounds: Rounds, chosen: Tried) -> dict[str, Tried]:
        """Try, for each axis, the shape one step beyond the chosen one, in the rounds that this took part in."""
        found = {}
        shape = shape_of(chosen.cut, self.space)
        steps = {
            axis: self._cut(one.shape) for axis, one in one_step_further(self.space, shape, speed=self._speed).items()
        }
        for axis, tried in zip(steps, rounds.first(list(steps.values())), strict=True):
            found[axis] = rounds.repaired(tried) if rounds.refit else tried
        return found

    def _cut(self, shape: Shape) -> Cut:
        """Return the cut to a shape."""
        removed = tuple(sorted(self._order[: self.space.anatomy.num_layers - shape.layers]))
        sizes = PlannedSizes(removed, shape.layers, shape.neurons, shape.experts, shape.kv_groups)
        return choose_cut(self.space.anatomy, self.search.scores, sizes=sizes)
