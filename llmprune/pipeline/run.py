"""A run from recipe to report: plan, scores, cut, pruned checkpoint, evaluation, report, push."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmprune.checkpoint.llama_cpp.write_gguf import gguf_bytes
from llmprune.common.devices import describe_gpus, use_gpus
from llmprune.common.distributed import (
    broadcast_from_first,
    has_launcher,
    is_first_process,
    local_device,
    synchronized,
    world_size,
)
from llmprune.common.errors import ModelError, RecipeError
from llmprune.common.files import folder_size, require_space
from llmprune.common.hub.secrets import redact_logs
from llmprune.common.libraries import quiet_libraries, seconds_of_imports
from llmprune.common.local_processes import is_own_process
from llmprune.common.notebook import progress_in_notebook
from llmprune.common.process_memory import bound_kernel_caches, keep_freed_memory
from llmprune.common.progress import report_progress
from llmprune.evaluation.lm_eval.tasks import fetch_tasks
from llmprune.pipeline.agreement import require_same_everywhere
from llmprune.pipeline.batches import Batches
from llmprune.pipeline.calibration_check import require_halves
from llmprune.pipeline.context import AmongRounds, RunContext, Search
from llmprune.pipeline.family import run_family
from llmprune.pipeline.finish import FinishedRun, write_family
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.options import RunOptions
from llmprune.pipeline.recover import is_begun, require_begun
from llmprune.pipeline.rounds import after_earlier_rounds
from llmprune.pipeline.search.settle import found_of, generated_for_search, search_of_run, settled_context
from llmprune.pipeline.self_generated import generated_in_folder
from llmprune.pipeline.steps import run_steps
from llmprune.planning.budget.settle import is_open
from llmprune.planning.duration.estimate import Durations
from llmprune.planning.duration.measured import expecting_durations
from llmprune.planning.plan import PlanningOutcome, plan_and_check
from llmprune.planning.plan_schema import Plan
from llmprune.planning.rounds.recipes import has_rounds
from llmprune.planning.texts.self_generated import ChosenNumbers
from llmprune.planning.timing import estimate_durations
from llmprune.publish.generated_windows import GENERATED
from llmprune.publish.quantized_result import check_pushes
from llmprune.recipe.recipe import Recipe, refuse_tokens
from llmprune.report.runs import Run
from llmprune.results.figures.search import SearchFigures
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.earlier_products import take_scores
from llmprune.results.run_folder.fingerprints import fingerprint
from llmprune.results.run_folder.folder import RunFolder, bytes_at_hand
from llmprune.results.run_folder.products import MEMBERS, PLAN, ROUNDS
from llmprune.results.run_folder.replacing import recipe_of_model, remove

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    output: str | Path = "runs/llmprune",
    *,
    fresh: bool = False,
    measure_forward: bool = False,
    calibration_check: bool = False,
) -> Report:
    """Prune a model as the recipe says into the run folder ``output``, and reuse the products that are there.

    One process does the work, with the layers placed over the GPUs that ``recipe.devices`` chooses. These stay the only
    ones that it sees. Under torchrun every process calls this function and gets the report: of a family that of the
    first member whose gate is not passed, or of the smallest. See ``RunOptions`` for the options. Raises subclasses of
    LLMPruneError; GateNotMet only after the report is written.
    """
    options = RunOptions(fresh=fresh, measure_forward=measure_forward, calibration_check=calibration_check)
    with progress_in_notebook(f"Pruning {recipe.model.id}"):
        return run_to_report(recipe, Path(output), options=options).require_gate()


def run_to_report(recipe: Recipe, output: Path, *, options: RunOptions) -> FinishedRun:
    """Run a recipe and return its report whether or not the gate is passed. Raises subclasses of LLMPruneError."""
    with _prepared(recipe, output, options=options) as planned:
        return _run_planned(planned, output, options=options)


@contextmanager
def _prepared(recipe: Recipe, output: Path, *, options: RunOptions) -> Iterator[_Planned]:
    """Plan and check a recipe, and yield it for its run."""
    loading = seconds_of_imports()
    report_progress("planning")
    quiet_libraries()
    redact_logs()
    bound_kernel_caches()
    keep_freed_memory()
    with synchronized():
        use_gpus(recipe.devices)
        refuse_tokens(recipe.text, recipe.overrides, source="recipe")
        asked = recipe_of_model(recipe)
        if options.scores_of is not None and is_first_process():
            take_scores(options.scores_of, output)
        chosen = ChosenNumbers() if options.fresh else generated_in_folder(recipe, output)
        outcome = plan_and_check(recipe, of_run=chosen)
        plan = outcome.require()[0]
        if plan.shortage:
            raise ModelError(plan.shortage)
        if is_first_process():
            _check_requirements(outcome.texts.recipe, plan, output=output, options=options)
        yield _Planned(outcome, asked, loading)


@dataclass(frozen=True)
class _Planned:
    """A recipe that was planned and checked. ``asked``: its values before the plan settled some."""

    outcome: PlanningOutcome
    asked: Mapping[str, Any]
    loading: float | None = None  # seconds in which this process loaded the libraries; None: not measured

    @classmethod
    def of_round(cls, outcome: PlanningOutcome) -> _Planned:
        """Return the plan of a round, whose recipe leaves nothing open."""
        return cls(outcome, recipe_of_model(outcome.texts.recipe))


def _run_planned(planned: _Planned, output: Path, *, options: RunOptions) -> FinishedRun:
    """Run a recipe in the folder ``output``: the search for its shape, the members of its family, all rounds."""
    with _opened(planned, output, options=options) as context:
        if is_open(context.recipe):
            search = _searched(context, options)
            if context.recipe.budget and context.recipe.budget.family:
                return _run_family(context, search, options=options)
            context = settled_context(context, search)
            context = replace(context, durations=_estimated(context.plan, options, loading=None))
            options = replace(options, generated={**options.generated, **generated_for_search(context)})
            _write_plan(context)
        if has_rounds(context.recipe):
            context, options = _after_earlier_rounds(context, options=options)
        with expecting_durations(context.durations, context.recipe):
            report = run_steps(context, options)
        if options.fresh and is_first_process():
            remove(context.folder.home / MEMBERS)  # of a family that this run replaces
        return FinishedRun(report, context.whole_recipe, context.folder.path)


def search_only(recipe: Recipe, output: Path, *, fresh: bool = False) -> SearchFigures:
    """Search the shapes for a recipe's budget in the run folder ``output``, where a run continues from the result.

    Every process calls this. Raises RecipeError for a recipe without a budget, and what a run raises.
    """
    if recipe.budget is None:
        raise RecipeError("search: the recipe has no budget; add one, such as budget: {parameters: 0.75}")
    options = RunOptions(fresh=fresh)
    with _prepared(recipe, output, options=options) as planned, _opened(planned, output, options=options) as context:
        return found_of(_searched(context, options))


def _searched(context: RunContext, options: RunOptions) -> Search:
    """Search the shapes for the budgets of a recipe."""
    with expecting_durations(context.durations, context.recipe):
        found = search_of_run(context, generated=options.generated.get(GENERATED), known=options.searched)
    context.inputs.release()  # the rest of the run opens the model anew, for the shape that was found
    return found


@contextmanager
def _opened(planned: _Planned, output: Path, *, options: RunOptions) -> Iterator[RunContext]:
    """Yield the context of a run whose folder is open and whose texts are read."""
    (plan, anatomy), text = planned.outcome.require(), planned.outcome.texts
    folder = RunFolder.open(output, options.fresh, model=text.recipe.model.id, recipe=planned.asked)
    try:
        inputs = RunInputs(text.recipe, anatomy, texts=text, reserve=_disk_needed(plan), devices=plan.devices)
        durations = _estimated(plan, options, loading=planned.loading)
        batches = Batches.planned(plan.batch_sizes)
        context = RunContext(text.recipe, plan, inputs, folder, batches, durations, options.end_recovery, options.among)
        context = replace(context, search=options.search)
        _begin(context, planned.asked)
        yield context
    finally:
        folder.close()


def _run_family(context: RunContext, search: Search, *, options: RunOptions) -> FinishedRun:
    """Run every member of a family; return the first that does not pass its gate, or the smallest one."""

    def run_member(
        outcome: PlanningOutcome, output: Path, *, asked: Recipe, generated: Mapping[str, Path], search: Search
    ) -> FinishedRun:
        own = replace(options, generated=generated, search=search)
        return _run_planned(_Planned(outcome, recipe_of_model(asked)), output, options=own)

    finished = run_family(context, search, run=run_member)
    family = tuple(Run(str(number), one.report) for number, one in enumerate(finished, start=1))
    write_family(context.folder, family)
    context.folder.take_over()  # of a finished run that --fresh replaces
    failed = (one for one in finished if one.report.gate is not None and not one.report.gate.passed)
    return replace(next(failed, finished[-1]), family=family)


def _after_earlier_rounds(context: RunContext, *, options: RunOptions) -> tuple[RunContext, RunOptions]:
    """Run the rounds before the last, and return context and options of the last one."""
    text = context.inputs.texts
    if options.fresh and is_first_process():
        remove(context.folder.home / ROUNDS)

    def run_round(
        outcome: PlanningOutcome, output: Path, *, generated: Mapping[str, Path], among: AmongRounds
    ) -> Report:
        own = RunOptions(end_recovery=_ends(options, output), generated=generated, among=among)
        return _run_planned(_Planned.of_round(outcome), output, options=own).report

    context, generated = after_earlier_rounds(context, text, generated=options.generated, run=run_round)
    durations, ends = _estimated(context.plan, options, loading=None), _ends(options, context.folder.path)
    return replace(context, durations=durations, end_recovery=ends), replace(options, generated=generated)


def _ends(options: RunOptions, folder: Path) -> bool:
    """Check that --end-recovery ends a round's training: only the one that was stopped, not later ones."""
    return options.end_recovery and broadcast_from_first(is_begun(folder) if is_first_process() else False)


def _estimated(plan: Plan, options: RunOptions, *, loading: float | None) -> Durations | None:
    """Return the durations of the run, in the first process only, which reports them."""
    if not is_first_process():
        return None
    return estimate_durations(
        plan,
        loading=loading,
        measures_forward=options.measure_forward,
        checks_calibration=options.calibration_check,
    )


def _check_requirements(recipe: Recipe, plan: Plan, *, output: Path, options: RunOptions) -> None:
    """Check access to the hub, calibration halves, evaluation tasks and free disk before any expensive work."""
    if recipe.hub:
        check_pushes(recipe, recipe.hub)
    if options.calibration_check:
        require_halves(recipe)
    if options.end_recovery:
        require_begun(output)
    fetch_tasks(recipe.evaluation)
    needed = _disk_needed(plan) + gguf_bytes(plan.pruned.parameters, recipe.export.gguf)
    needed += plan.disk if recipe.export.requantize else 0
    require_space(output, needed, written=bytes_at_hand(output, fresh=options.fresh))
    _log_devices(recipe)


def _log_devices(recipe: Recipe) -> None:
    """Log the number of processes and their devices, and a choice of devices that the launcher overrides."""
    # visible by default under a launcher: accelerate launch --cpu --num_processes 2 silently starts one process
    level = logging.WARNING if has_launcher() else logging.INFO
    gpus, smallest = describe_gpus() if local_device().type == "cuda" else ("", "")
    plural = "" if world_size() == 1 else "es"
    logger.log(level, "running in %d process%s on %s", world_size(), plural, gpus or local_device())
    if smallest:
        logger.warning(smallest)
    if recipe.devices != "all" and has_launcher() and not is_own_process():
        logger.warning("devices: not used, because the launcher of this process has chosen its GPU")


def _begin(context: RunContext, asked: Mapping[str, Any]) -> None:
    """Read the texts and begin the run folder. ``asked``: the recipe's own values, before the plan chose some."""
    report_progress("reading text")
    context.inputs.read_texts()
    require_same_everywhere(context)
    _begin_folder(context, asked)


def _begin_folder(context: RunContext, asked: Mapping[str, Any]) -> None:
    """Record the run's origin, recipe and plan in its folder. Raises DiskError where its replacement does not fit."""
    recipe, inputs, folder = context.recipe, context.inputs, context.folder
    folder.begin(asked, fingerprint(inputs.identity, inputs.text_fingerprint))
    if is_first_process() and folder.path != folder.home:  # the finished run is kept until the new one is complete
        require_space(folder.home, _disk_needed(context.plan), written=folder_size(folder.path))
    folder.write("recipe.yaml", recipe.text)
    _write_plan(context)


def _write_plan(context: RunContext) -> None:
    plan = context.plan.model_copy(update={"durations": context.durations})
    context.folder.write(PLAN, plan.model_dump_json(indent=1) + "\n")


def _disk_needed(plan: Plan) -> int:
    """Bytes of disk that a run needs: checkpoint in parts and joined, snapshots of hidden states, training files."""
    largest = max([plan.disk, *(one.size.bytes for one in plan.rounds)])
    checkpoints = 2 if plan.vocabulary is None else 3  # the whole vocabulary stays beside the cut one
    return checkpoints * largest + 2 * plan.memory.hidden_states + (plan.recovery.disk if plan.recovery else 0)
