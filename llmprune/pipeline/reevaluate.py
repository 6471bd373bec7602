"""``llmprune reevaluate``: a finished run's model on more samples of its tasks, with a new report and verdict."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from llmprune.checkpoint.loading import load_model, load_tokenizer
from llmprune.common.distributed import broadcast_from_first, is_first_process, synchronized
from llmprune.common.errors import OutputError
from llmprune.common.hub.client import resolve_revision
from llmprune.common.hub.secrets import redact_logs
from llmprune.common.progress import quiet_libraries
from llmprune.common.versions import now
from llmprune.evaluation.evaluate import Measured
from llmprune.evaluation.gate import judge
from llmprune.evaluation.lm_eval.harness import ask, subject
from llmprune.evaluation.lm_eval.tasks import check_tasks
from llmprune.evaluation.more_samples import samples_to_ask
from llmprune.evaluation.retention import CONFIDENCE, compare
from llmprune.pipeline.run import pruned_source, push_as_asked, require_gate
from llmprune.pipeline.step_costs import account
from llmprune.publish.push import MORE_SAMPLES, finished_report, require_whole
from llmprune.recipe.recipe import Recipe
from llmprune.report.html.page import render_page
from llmprune.results.run_folder import TASKS, RunFolder
from llmprune.results.schema import Report

LIMIT = "evaluation.limit"


def reevaluate(path: Path, limit: int | None = None) -> Report:
    """Ask dense and pruned model more samples, ``limit`` of each task or as many as the gate needs.

    Nothing is pruned again, and answers that are kept in the run folder and the cache of base models are not asked
    again where the task allows that. Raises GateNotMet after the report is written, else LLMPruneError in its kinds.
    """
    quiet_libraries()
    redact_logs()
    resolve_revision.cache_clear()
    with synchronized():
        folder = RunFolder.open_finished(path)
        try:
            report, recipe = _evaluated(folder, limit)
        finally:
            folder.close()
    require_gate(report, recipe, folder=folder.path)
    return report


def _evaluated(folder: RunFolder, limit: int | None) -> tuple[Report, Recipe]:
    found = broadcast_from_first(_finished(folder.path) if is_first_process() else None)
    assert found is not None, "the first process reads it or raises"
    old, known = found
    before = Recipe.parse(old.recipe_text, old.overrides, source=str(folder.path / "recipe.yaml"))
    documents = [task.documents for task in old.tasks]
    asked = samples_to_ask(old.gate, before.evaluation.limit, documents=documents, wanted=limit)
    overrides = [one for one in old.overrides if one.partition("=")[0].strip() != LIMIT]
    recipe = Recipe.parse(old.recipe_text, [*overrides, f"{LIMIT}={asked}"])
    if is_first_process():
        check_tasks(recipe.evaluation)
        require_whole(folder.path / "model", old.pruned.parameters)
    measured = _measured(folder, recipe, old=old, earlier=before.evaluation.limit, known=known)
    report = _judged(old, recipe, measured=measured, folder=folder)
    folder.forget("evaluation")
    folder.write("evaluation.json", measured.model_dump_json(indent=1) + "\n")
    folder.write("report.json", report.model_dump_json(indent=1) + "\n")
    folder.write("report.html", render_page(report))
    return push_as_asked(recipe, folder, report=report), recipe


def _finished(path: Path) -> tuple[Report, Measured]:
    """Read the report and the measurements of a run. Raises OutputError where there are none, or none of tasks."""
    report = finished_report(path)
    if not report.tasks:
        raise OutputError(
            f"the run in {path} evaluated no task, so there are no samples to add to; name some in evaluation.tasks "
            "of its recipe and run it again, which only evaluates"
        )
    measured = path / "evaluation.json"
    try:
        return report, Measured.model_validate_json(measured.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise OutputError(f"{measured} cannot be read; run the recipe again, which evaluates anew") from error


def _measured(folder: RunFolder, recipe: Recipe, *, old: Report, earlier: int | None, known: Measured) -> Measured:
    """The run's measurements with the tasks asked anew; the base model is taken at the commit that was pruned."""
    base = recipe.model
    if old.provenance.commit:
        base = base.model_copy(update={"revision": old.provenance.commit})
    pruned = pruned_source(recipe.model, folder.path / "model")
    tokenizer = load_tokenizer(base)
    with account(folder.steps, MORE_SAMPLES):
        dense = ask(
            subject(base, tokenizer, load=lambda: load_model(base)),
            "dense",
            evaluation=recipe.evaluation,
            earlier=earlier,
        )
        store = folder.path / TASKS
        found = ask(
            subject(pruned, tokenizer, load=lambda: load_model(pruned), folder=store),
            "pruned",
            evaluation=recipe.evaluation,
            earlier=earlier,
        )
    return known.model_copy(update={"dense_tasks": dense, "pruned_tasks": found})


def _judged(old: Report, recipe: Recipe, *, measured: Measured, folder: RunFolder) -> Report:
    gate = recipe.evaluation.gate
    comparison = compare(
        measured.dense_tasks, measured.pruned_tasks, confidence=gate.confidence if gate else CONFIDENCE
    )
    return old.model_copy(
        update={
            "created": now(),
            "recipe": recipe.model_dump(mode="json"),
            "overrides": recipe.overrides,
            "tasks": comparison.tasks,
            "groups": comparison.groups,
            "mean_retention": comparison.mean.retention if comparison.mean else None,
            "retention": comparison.mean,
            "gate": judge(gate, comparison),
            "steps": old.steps + tuple(folder.steps),
        }
    )
