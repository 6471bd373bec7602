"""Plan a recipe before weights are read: sizes, memory, and everything that a run would refuse.

Parameters are counted on the model's own code, built on the meta device, not by formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.loading import load_config
from llmprune.checkpoint.result.base_files import planned_files
from llmprune.checkpoint.stored_dtypes import kept_dtypes
from llmprune.common.hub.client import resolve_revision
from llmprune.common.linalg.precision import dtype_name
from llmprune.planning.base import Base, describe_base, require_complete
from llmprune.planning.budget.plan import plan_budget, stored_speed, with_search
from llmprune.planning.budget.settle import is_open
from llmprune.planning.checks import ErrorCollector, run_checks
from llmprune.planning.duration.estimate import run_work
from llmprune.planning.duration.parts import PlannedModels
from llmprune.planning.duration.recovering import recovery_parts
from llmprune.planning.lineage import lineage_of, settle_first_base
from llmprune.planning.memory.machine import Machine, this_machine
from llmprune.planning.memory.passes import bytes_of_window, memory_of, memory_planner
from llmprune.planning.next_tools.lost_tools import with_next_tools
from llmprune.planning.notes.plan_notes import is_exact, notes_of
from llmprune.planning.notes.scores import require_disk_for_hidden_states
from llmprune.planning.plan_schema import Plan, PlannedTask
from llmprune.planning.prediction_heads import about_declared, with_prediction_heads
from llmprune.planning.recovery.device_fit import recovery_shortage
from llmprune.planning.recovery.plan import plan_recovery
from llmprune.planning.reference import size_of_reference, without_reference
from llmprune.planning.rounds.plan import RoundToPlan, with_rounds
from llmprune.planning.rounds.recipes import has_rounds
from llmprune.planning.sizes.model_size import measure_size
from llmprune.planning.sizes.planned_cut import collect_planned_cut
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.planning.sizes.pruned_model import pruned_meta_model
from llmprune.planning.sparsity import planned_sparsity
from llmprune.planning.texts.begin_of_text import about_begin, planned_begin
from llmprune.planning.texts.calibration_sources import calibration_sources
from llmprune.planning.texts.self_generated import (
    NOTHING_CHOSEN,
    ChosenNumbers,
    about_self_generated,
    settle_self_generated,
)
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.planning.vocabulary.counted import counted_tokens, with_vocabulary
from llmprune.planning.vocabulary.plan import planned_vocabulary
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.result_files import BaseFiles
from llmprune.results.sentences.lineage import describe_lineage


@dataclass(frozen=True)
class PlanningOutcome:
    """All that is known of a recipe before weights are read. ``plan`` is None only if ``errors`` has some.

    ``texts.recipe``: the recipe with the choices made that it leaves to the plan.
    """

    plan: Plan | None
    anatomy: Anatomy | None
    texts: TextInputs
    errors: ErrorCollector

    def require(self, source: str = "") -> tuple[Plan, Anatomy]:
        """Return plan and anatomy. Raises LLMPruneError that lists every problem; ``source``: the recipe's name."""
        self.errors.raise_all(source)
        assert self.plan is not None, "without errors there is a plan"
        assert self.anatomy is not None, "a plan is made from an anatomy"
        return self.plan, self.anatomy


def make_plan(recipe: Recipe) -> Plan:
    """Plan a recipe without reading weights. Raises LLMPruneError that lists everything a run would refuse."""
    return plan_and_check(recipe).require()[0]


def plan_and_check(
    recipe: Recipe,
    *,
    wrong: Iterable[str] = (),
    problems: Iterable[str] = (),
    elsewhere: bool = False,
    starts: int = 1,
    of_run: ChosenNumbers | None = None,
) -> PlanningOutcome:
    """Plan a recipe and run every check, even after earlier ones have failed.

    ``wrong``: keys that were removed from the recipe because their values are wrong; ``problems``: a sentence for each.
    ``elsewhere``: the run will have other GPUs than this process. ``starts``: number of processes that the run will
    start in place of this one. ``of_run``: the numbers that an earlier part of a run chose for ``self_generated:
    auto``, where this is the plan of a run; that alone counts the text of a vocabulary however long it is.
    """
    resolve_revision.cache_clear()
    errors = ErrorCollector(wrong, problems)
    against = ("recover.against", "evaluation.against")
    _, settled = errors.attempt(against[1], (*against, "model"), work=lambda: settle_first_base(recipe))
    recipe = settled or without_reference(recipe)
    asked, recipe = (
        recipe,
        recipe if elsewhere else settle_self_generated(recipe, starts=starts, chosen=of_run or NOTHING_CHOSEN),
    )
    inputs = TextInputs(recipe)
    check, count = partial(run_checks, inputs, errors, elsewhere=elsewhere), partial(counted_tokens, inputs, errors)
    structure = partial(plan_structure, recipe, errors, starts=starts, elsewhere=elsewhere)
    if is_open(recipe) and recipe.vocabulary:  # candidates have the size of the tokens that are kept
        check()
        plan, anatomy = structure(tokens=count(whole=of_run is not None))
    else:
        plan, anatomy = structure()
        check()
        count(whole=of_run is not None)
    if plan and not errors.found:
        plan = with_vocabulary(plan, inputs)
        notes = (*plan.notes, *about_begin(inputs), *about_self_generated(asked, recipe), *inputs.recovery_notes)
        plan = plan.model_copy(update={"begin_of_text": planned_begin(inputs), "notes": notes})
    return PlanningOutcome(plan, anatomy, inputs, errors)


def plan_structure(
    recipe: Recipe,
    errors: ErrorCollector,
    *,
    starts: int = 1,
    elsewhere: bool = False,
    tokens: int | None = None,
) -> tuple[Plan | None, Anatomy | None]:
    """Return plan and anatomy, from the model's config and headers; None in place of one that an error prevents.

    ``starts``: number of processes that the run will start in place of this one. ``elsewhere``: as in
    ``plan_and_check``. ``tokens``: that the vocabulary keeps beside a budget, where they are counted.
    """
    model = ("model",)
    _, config = errors.attempt("model", model, work=lambda: load_config(recipe.model))
    if config is None:
        errors.wrong += model  # every check that needs the config would repeat this error
        return None, None
    _, base = errors.attempt("model", model, work=lambda: describe_base(recipe, config))
    if base is None:
        return None, None
    complete, _ = errors.attempt("model", model, work=lambda: require_complete(recipe, base))
    opened = None
    if is_open(recipe):
        speed = partial(stored_speed, recipe, base, elsewhere=elsewhere)
        plan_open = partial(plan_budget, recipe, base, tokens=tokens)
        _, opened = errors.attempt("budget", ("budget", "vocabulary", *model), work=lambda: plan_open(speed=speed()))
        if opened is None:
            return None, base.anatomy
    own = opened.recipe if opened else recipe
    planned = collect_planned_cut(own, base.anatomy, errors=errors)
    if planned is None or not complete:
        return None, base.anatomy
    cuts = ("depth", "width", "experts", "hidden", "budget", "vocabulary", "sparsity")
    reads = ("model", *cuts, "refit", "calibration", "recover")

    def plan_on_machine() -> Plan:
        machine = this_machine(recipe.model, starts=starts, elsewhere=elsewhere)
        return _plan_with_rounds(own, base, planned=planned, machine=machine)

    _, plan = errors.attempt("model", reads, work=plan_on_machine)
    if plan and opened:
        work = with_search(plan.work, opened.plan.search)
        notes = (*opened.notes, *plan.notes, *about_declared(base))
        plan = plan.model_copy(update={"budget": opened.plan, "work": work, "notes": notes})
    elif plan:
        plan = with_next_tools(plan, base, planned=planned)
        plan = with_prediction_heads(plan, base, recipe=recipe, planned=planned)
    return plan, base.anatomy


def _plan_with_rounds(recipe: Recipe, base: Base, *, planned: PlannedCut, machine: Machine) -> Plan:
    """Return the plan of all rounds of a cut, or of its only one."""
    plan = _plan(recipe, base, planned=planned, machine=machine)
    if not has_rounds(recipe):
        return plan

    def plan_one(one: RoundToPlan) -> Plan:
        return _plan(one.recipe, one.base, planned=one.planned, machine=machine)

    return with_rounds(plan, recipe, base=base, plan_one=plan_one)


def _tasks(evaluation: Evaluation) -> tuple[PlannedTask, ...]:
    """Return the tasks, with the most samples of each."""
    return tuple(PlannedTask(name=name, limit=evaluation.limit_of(name)) for name in evaluation.task_names)


def _plan(recipe: Recipe, base: Base, *, planned: PlannedCut, machine: Machine) -> Plan:
    """Return the plan of a cut. Raises ModelError and RecipeError where the cut is not possible."""
    dense, anatomy, dtype = base.dense, base.anatomy, base.dense.dtype
    reference = base.size if recipe.reference == recipe.model else size_of_reference(recipe)
    widths = planned.widths.kept
    pruned = pruned_meta_model(recipe, base, planned=planned)
    sparsity = planned_sparsity(recipe, pruned, anatomy=anatomy, planned=planned)
    notes = notes_of(recipe, base, planned=planned, pruned=pruned, sparsity=sparsity)
    require_disk_for_hidden_states(recipe, anatomy.num_layers * bytes_of_window(recipe, dense))
    files = planned_files(recipe.model)
    saved = kept_dtypes(base.names, dtype, keep=recipe.model.dtype == "auto")
    size = measure_size(pruned, planned.sizes.completed(anatomy), stored=saved)
    lineage = lineage_of(recipe.model, base.size.parameters) if base.has_files else ()
    memory = memory_of(recipe, dense, pruned=pruned, anatomy=anatomy, widths=widths)
    planner = memory_planner(recipe, dense, pruned=pruned, anatomy=anatomy, memory=memory, machine=machine)
    batches = planner.batch_sizes()
    compared = reference.parameters / base.size.parameters
    models = PlannedModels(dense, pruned, anatomy, planned, size.bytes, batches, reference=compared)
    recovery = plan_recovery(recipe, models, machine=machine)
    training = recovery_parts(recipe.recover, recovery, models=models, on_gpu=machine.has_gpu)
    return Plan(
        model=recipe.model.id,
        model_type=base.config.model_type,
        dtype=dtype_name(dtype),
        dense=reference,
        pruned=size,
        lineage=lineage,
        parameters_exact=is_exact(recipe.depth, base),
        removed_layers=recipe.depth.layers if recipe.depth else (),
        keep_layers=len(planned.layers),
        keep_widths=widths,
        keep_experts=planned.experts,
        keep_kv_groups=planned.heads.kv_groups,
        keep_hidden=planned.hidden.size,
        vocabulary=planned_vocabulary(recipe, base, stored=saved),
        sparsity=sparsity,
        calibration=recipe.calibration.shape(),
        calibration_sources=calibration_sources(recipe.calibration),
        memory=memory,
        processes=machine.processes,
        batch_sizes=batches,
        devices=planner.devices(batches),
        recovery=recovery,
        shortage=planner.shortage() or recovery_shortage(recipe, models, machine=machine),
        disk=size.bytes,
        work=run_work(recipe, models, recovery=training),
        base_files=BaseFiles(carried=files.copied, left=files.left_out),
        tasks=_tasks(recipe.evaluation),
        notes=(*([chain] if (chain := describe_lineage(lineage)) else []), *notes),
    )
