"""A run from recipe to report: plan, scores, cut, pruned checkpoint, evaluation, report, push."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmprune.common.devices import describe_gpus, use_gpus
from llmprune.common.distributed import (
    broadcast_from_first,
    has_launcher,
    is_first_process,
    local_device,
    synchronized,
    world_size,
)
from llmprune.common.errors import ModelError
from llmprune.common.files import folder_size, require_space
from llmprune.common.hub.secrets import redact_logs
from llmprune.common.libraries import quiet_libraries, seconds_of_imports
from llmprune.common.local_processes import is_own_process
from llmprune.common.process_memory import bound_kernel_caches, keep_freed_memory
from llmprune.common.progress import expecting, report_progress
from llmprune.evaluation.lm_eval.tasks import fetch_tasks
from llmprune.pipeline.agreement import require_same_everywhere
from llmprune.pipeline.batches import Batches
from llmprune.pipeline.calibration_check import check_calibration, require_halves
from llmprune.pipeline.compose_report import (
    RunResults,
    compose_report,
)
from llmprune.pipeline.context import AmongRounds, RunContext
from llmprune.pipeline.evaluate import evaluate
from llmprune.pipeline.finish import FinishedRun, push_as_requested, write_report
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.prune_checkpoint import prune_checkpoint
from llmprune.pipeline.recover import is_begun, recover_checkpoint, require_begun
from llmprune.pipeline.recovery_text import windows_of_tokens
from llmprune.pipeline.rounds import after_earlier_rounds
from llmprune.pipeline.score_and_select import find_cut, find_scores
from llmprune.pipeline.self_generated import add_self_generated, generated_in_folder
from llmprune.pipeline.source_check import check_sources, compares_sources
from llmprune.pipeline.step_costs import (
    time_dense_forward_pass,
)
from llmprune.planning.duration.estimate import Durations
from llmprune.planning.plan import Plan, PlanningOutcome, plan_and_check
from llmprune.planning.round_recipes import has_rounds
from llmprune.planning.self_generated import ChosenNumbers
from llmprune.planning.text_inputs import TextInputs
from llmprune.planning.timing import estimate_durations
from llmprune.publish.generated_windows import GENERATED, GENERATED_FOR_RECOVERY
from llmprune.publish.preflight import check_push
from llmprune.recipe.recipe import Recipe, refuse_tokens
from llmprune.results.products import PLAN, ROUNDS
from llmprune.results.replacing import recipe_of_model, remove
from llmprune.results.report_schema import Report
from llmprune.results.run_folder import RunFolder, bytes_at_hand, fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that no recipe has.

    ``fresh`` makes every product anew. ``measure_forward`` times plain forward passes of the dense model over the
    calibration tokens, for comparison. ``calibration_check`` repeats the selection on each source of the calibration
    text, or on each half of a single one, and reports how far the cuts agree. ``end_recovery`` takes the best weights
    of a training that was stopped, and trains no more in its round. ``generated``: files of windows that a published
    run's dense model wrote, by their names in its repository, for a run that repeats it. ``among``: of a run that is
    one of several rounds.
    """

    fresh: bool = False
    measure_forward: bool = False
    calibration_check: bool = False
    end_recovery: bool = False
    generated: Mapping[str, Path] = field(default_factory=dict)
    among: AmongRounds | None = None


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
    ones that it sees. Under torchrun every process calls this function and gets the report. See ``RunOptions`` for the
    options. Raises subclasses of LLMPruneError; GateNotMet only after the report is written.
    """
    options = RunOptions(fresh=fresh, measure_forward=measure_forward, calibration_check=calibration_check)
    return run_to_report(recipe, Path(output), options=options).require_gate()


def run_to_report(recipe: Recipe, output: Path, *, options: RunOptions) -> FinishedRun:
    """Run a recipe and return its report whether or not the gate is passed. Raises subclasses of LLMPruneError."""
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
        surveyed = plan_and_check(
            recipe, generated=ChosenNumbers() if options.fresh else generated_in_folder(recipe, output)
        )
        plan = surveyed.require()[0]
        if plan.shortage:
            raise ModelError(plan.shortage)
        if is_first_process():
            _check_requirements(surveyed.inputs.recipe, plan, output=output, options=options)
        return _run_planned(_Planned(surveyed, asked, loading), output, options=options)


@dataclass(frozen=True)
class _Planned:
    """A recipe that was planned and checked. ``asked``: its values before the plan settled some."""

    surveyed: PlanningOutcome
    asked: Mapping[str, Any]
    loading: float | None = None  # seconds in which this process loaded the libraries; None: not measured

    @classmethod
    def of_round(cls, surveyed: PlanningOutcome) -> _Planned:
        """Return the plan of a round, whose recipe leaves nothing open."""
        return cls(surveyed, recipe_of_model(surveyed.inputs.recipe))


def _run_planned(planned: _Planned, output: Path, *, options: RunOptions) -> FinishedRun:
    """Run all rounds of a recipe in the folder ``output``."""
    (plan, anatomy), text = planned.surveyed.require(), planned.surveyed.inputs
    folder = RunFolder.open(output, options.fresh, model=text.recipe.model.id, recipe=planned.asked)
    try:
        inputs = RunInputs(text.recipe, anatomy, inputs=text, reserve=_disk_needed(plan), devices=plan.devices)
        durations = _estimated(plan, options, loading=planned.loading)
        batches = Batches.planned(plan.batch_sizes)
        context = RunContext(text.recipe, plan, inputs, folder, batches, durations, options.end_recovery, options.among)
        _begin(context, planned.asked)
        if has_rounds(text.recipe):
            context, options = _after_earlier_rounds(context, text, options=options)
        with expecting(context.durations.expected() if context.durations else ()):
            report = _run_steps(context, options)
        return FinishedRun(report, text.recipe, folder.path)
    finally:
        folder.close()


def _after_earlier_rounds(
    context: RunContext, text: TextInputs, *, options: RunOptions
) -> tuple[RunContext, RunOptions]:
    """Run the rounds before the last, and return context and options of the last one."""
    if options.fresh and is_first_process():
        remove(context.folder.home / ROUNDS)

    def run_round(
        surveyed: PlanningOutcome, output: Path, *, generated: Mapping[str, Path], among: AmongRounds
    ) -> Report:
        own = RunOptions(end_recovery=_ends(options, output), generated=generated, among=among)
        return _run_planned(_Planned.of_round(surveyed), output, options=own).report

    context, generated = after_earlier_rounds(context, text, generated=options.generated, run=run_round)
    durations, ends = _estimated(context.plan, options, loading=None), _ends(options, context.folder.path)
    return replace(context, durations=durations, end_recovery=ends), replace(options, generated=generated)


def _ends(options: RunOptions, folder: Path) -> bool:
    """Check that a round's training is to be ended: that which was stopped, and none that follows."""
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
        check_push(recipe.hub)
    if options.calibration_check:
        require_halves(recipe)
    if options.end_recovery:
        require_begun(output)
    fetch_tasks(recipe.evaluation)
    require_space(output, _disk_needed(plan), written=bytes_at_hand(output, fresh=options.fresh))
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


def _run_steps(context: RunContext, options: RunOptions) -> Report:
    """Make every product of one round."""
    add_self_generated(context, options.generated.get(GENERATED))
    lessons = windows_of_tokens(context, options.generated.get(GENERATED_FOR_RECOVERY))
    context.batches.settle(context.recipe, context.folder, sizes=context.plan.batch_sizes)
    if options.measure_forward:
        time_dense_forward_pass(context)
    scores = find_scores(context)
    chosen = find_cut(context, scores)
    stability = check_calibration(context) if options.calibration_check and not compares_sources(context) else None
    sources = check_sources(context, scores, cut=chosen.cut, asked=options.calibration_check)
    pruned = prune_checkpoint(context, chosen.cut)
    recovered = recover_checkpoint(context, chosen.cut, repaired=pruned, windows=lessons)
    if options.measure_forward:
        time_dense_forward_pass(context)  # a second time, because the speed of a machine drifts
    measured = evaluate(context, chosen.cut)
    if recovered is not None:
        pruned = replace(pruned, verified=recovered.verified)
    results = RunResults(
        scores, chosen, stability, sources, pruned, measured, recovery=recovered.figures if recovered else None
    )
    report = broadcast_from_first(compose_report(context, results))
    write_report(context.folder, report)
    if context.earlier and context.among and is_first_process():
        remove(context.among.predictions)
    return push_as_requested(context.whole_recipe, context.folder, report=report)


def _begin_folder(context: RunContext, asked: Mapping[str, Any]) -> None:
    """Record the run's origin, recipe and plan in its folder. Raises DiskError where its replacement does not fit."""
    recipe, inputs, folder = context.recipe, context.inputs, context.folder
    folder.begin(asked, fingerprint(inputs.identity, inputs.text_fingerprint))
    if is_first_process() and folder.path != folder.home:  # the finished run is kept until the new one is complete
        require_space(folder.home, _disk_needed(context.plan), written=folder_size(folder.path))
    folder.write("recipe.yaml", recipe.text)
    plan = context.plan.model_copy(update={"durations": context.durations})
    folder.write(PLAN, plan.model_dump_json(indent=1) + "\n")


def _disk_needed(plan: Plan) -> int:
    """Bytes of disk that a run needs: checkpoint in parts and joined, snapshots of hidden states, training files."""
    largest = max([plan.disk, *(one.size.bytes for one in plan.rounds)])
    return 2 * largest + 2 * plan.memory.hidden_states + (plan.recovery.disk if plan.recovery else 0)
