"""Evaluation of a finished run on more samples or further tasks, with a new report and verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from llmprune.checkpoint.loading import load_tokenizer
from llmprune.checkpoint.result.pruned_source import pruned_source
from llmprune.common.devices import use_gpus
from llmprune.common.distributed import broadcast_from_first, is_first_process, synchronized
from llmprune.common.errors import OutputError
from llmprune.common.hub.client import resolve_revision
from llmprune.common.hub.secrets import redact_logs
from llmprune.common.libraries import quiet_libraries
from llmprune.common.progress import report_progress
from llmprune.common.versions import now
from llmprune.evaluation.evaluate import Measured
from llmprune.evaluation.lm_eval.harness import evaluate_tasks, evaluated_model
from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.evaluation.lm_eval.tasks import check_tasks, fetch_tasks
from llmprune.evaluation.more_samples import next_limit, with_tasks
from llmprune.pipeline.finish import FinishedRun, push_as_requested, write_report
from llmprune.pipeline.report.compose_report import judge_scores
from llmprune.pipeline.step_costs import measure_step
from llmprune.planning.lineage import settle_first_base
from llmprune.publish.push import MORE_SAMPLES, require_whole
from llmprune.recipe.evaluation import Evaluation, limit_override
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.results.load_report import load_report
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.earlier_products import take_run
from llmprune.results.run_folder.folder import RunFolder
from llmprune.results.run_folder.products import GGUF_FILES, REPAIRED, TASKS


def reevaluate(
    path: Path,
    limit: int | None = None,
    *,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    output: Path | None = None,
    base: Path | None = None,
) -> FinishedRun:
    """Evaluate dense and pruned model on more samples of the run's tasks, or on further ``tasks``.

    ``limit``: samples of each task; None: as many as the gate needs. Where tasks have limits of their own, as those of
    a suite, these grow in proportion to what the gate needs, and ``limit`` is the least number for each. With ``tasks``
    it is the maximum of each of these, and the others keep their samples. ``include_path``: folder of their files.
    ``output``: folder for the new report, which shares the model's files; None: the run's own. ``base``: folder of the
    model that the run was compared with, where that lies elsewhere now.

    Nothing is pruned. Answers that the run folder or the cache of base models holds are reused where the task allows
    it. Uses the GPUs of the recipe's ``devices``, like the run. Raises subclasses of LLMPruneError.
    """
    quiet_libraries()
    redact_logs()
    resolve_revision.cache_clear()
    with synchronized():
        folder = RunFolder.open_finished(path) if output is None else None  # opening ends what a killed run began
        try:
            found = broadcast_from_first(_read_finished(path, tasks) if is_first_process() else None)
            assert found is not None, "the first process reads it or raises"
            if folder is None:
                assert output is not None, "or the run's own folder is open"
                if is_first_process():
                    take_run(path, output)
                folder = RunFolder.open_finished(output)
            old, known = found
            old = _with_base(old, base) if base is not None else old
            use_gpus(Recipe.parse(old.recipe_text, old.overrides).devices)
            recipe = _extended(old, limit, tasks=tasks, include_path=include_path)
            report, recipe = _evaluate_again(folder, recipe, old=old, known=known)
        finally:
            if folder is not None:
                folder.close()
    return FinishedRun(report, recipe, output or path)


def _with_base(report: Report, base: Path) -> Report:
    """Return the report with overrides that name the folder in which the base model is now. Raises OutputError."""
    recipe = Recipe.parse(report.recipe_text, report.overrides)
    recorded, place = recipe.reference.id, json.dumps(str(base.absolute()))
    if not base.is_dir():
        raise OutputError(f"--base {base} is no folder; give the folder of {recorded}, which the run was compared with")
    keys = {"model.id": recipe.model, "recover.against": recipe.recover, "evaluation.against": recipe.evaluation}
    named = {key: part.id if isinstance(part, ModelSource) else part and part.against for key, part in keys.items()}
    moved = tuple(f"{key}={place}" for key, name in named.items() if name == recorded)
    kept = tuple(one for one in report.overrides if not any(_sets(one, key.partition("=")[0]) for key in moved))
    return report.model_copy(update={"overrides": (*kept, *moved)})


def _evaluate_again(folder: RunFolder, recipe: Recipe, *, old: Report, known: Measured) -> tuple[Report, Recipe]:
    """Return the new report, and the recipe as it was evaluated. ``recipe``: with the new tasks or samples."""
    before = Recipe.parse(old.recipe_text, old.overrides, source=str(folder.path / "recipe.yaml"))
    recipe = settle_first_base(recipe, old.lineage)
    base = Path(recipe.reference.id)
    if base.is_absolute() and not base.exists():
        raise OutputError(f"the base model {base} is not there any more; give the folder that it has now with --base")
    if is_first_process():
        check_tasks(recipe.evaluation)
        require_whole(folder.path / "model", old.pruned.parameters)
    if _added_tasks(recipe.evaluation, before.evaluation):
        fetch_tasks(recipe.evaluation)
    measured = _measure(folder, recipe, old=old, earlier=before.evaluation, known=known)
    report = _new_report(old, recipe, measured=measured, folder=folder)
    folder.forget("evaluation")
    folder.write("evaluation.json", measured.model_dump_json(indent=1) + "\n")
    write_report(folder, report)
    return push_as_requested(recipe, folder, report=report), recipe


def _extended(old: Report, limit: int | None, *, tasks: Sequence[str], include_path: Path | None) -> Recipe:
    """Return the recipe of a report with further tasks, or with more samples of those that it has."""
    before = Recipe.parse(old.recipe_text, old.overrides)
    added = []
    if tasks:
        changed = with_tasks(before.evaluation, tasks, limit=limit)
        added.append(f"evaluation.tasks={json.dumps(changed['tasks'])}")
        if include_path is not None:
            changed["include_path"] = str(include_path.absolute())
            added.append(f"evaluation.include_path={json.dumps(changed['include_path'])}")
    else:
        documents = [(task.group or task.task, task.documents) for task in old.tasks]
        changed = {"limit": next_limit(old.gate, before.evaluation, documents=documents, wanted=limit)}
    added += [limit_override(changed["limit"])] if "limit" in changed else []
    kept = [one for one in old.overrides if not any(_sets(one, f"evaluation.{name}") for name in changed)]
    return Recipe.parse(old.recipe_text, [*kept, *added])


def _sets(override: str, name: str) -> bool:
    key = override.partition("=")[0].strip()
    return key == name or key.startswith(f"{name}.")


def _read_finished(path: Path, tasks: Sequence[str]) -> tuple[Report, Measured]:
    """Read report and measurements of a run. Raises OutputError where they are missing or there is no task."""
    report = load_report(path)
    if not report.tasks and not tasks:
        raise OutputError(
            f"the run in {path} evaluated no task, so there are no samples to add to; name some with --tasks"
        )
    measured = path / "evaluation.json"
    if tasks and not measured.is_file():  # the recipe measures nothing
        return report, Measured()
    try:
        return report, Measured.read(measured)
    except (OSError, ValidationError) as error:
        raise OutputError(f"{measured} cannot be read; run the recipe again, which evaluates anew") from error


def _measure(folder: RunFolder, recipe: Recipe, *, old: Report, earlier: Evaluation, known: Measured) -> Measured:
    """Return the measurements with the tasks evaluated again; the base model is loaded at the commit that was pruned.

    ``earlier``: settings of the evaluation before.
    """
    base = _base(recipe, old)
    layers = [row.layer for row in old.layers if not row.removed]
    pruned = pruned_source(recipe.model, folder.path / "model", layers=layers)
    tokenizer = load_tokenizer(base)
    has_own_tokens = recipe.vocabulary is not None or recipe.reference != recipe.model
    own = load_tokenizer(pruned) if has_own_tokens else tokenizer
    evaluation, added = recipe.evaluation, _added_tasks(recipe.evaluation, earlier)
    if added:
        evaluation = evaluation.model_copy(update={"suite": None, "tasks": added})
    with measure_step(folder.steps, MORE_SAMPLES):
        subjects = {
            "dense": evaluated_model(base, tokenizer),
            "pruned": evaluated_model(pruned, own, folder=folder.path / TASKS),
        }
        if known.repaired_tasks is not None:
            before = pruned_source(recipe.model, folder.path / REPAIRED, layers=layers)
            own = load_tokenizer(before) if has_own_tokens else tokenizer
            subjects["repaired"] = evaluated_model(before, own, folder=folder.path / TASKS / REPAIRED)
        tasks = {}
        for side, subject in subjects.items():
            report_progress(f"tasks: {side}")
            found = evaluate_tasks(subject, side, evaluation=evaluation, earlier=earlier)
            tasks[f"{side}_tasks"] = _joined(getattr(known, f"{side}_tasks"), found) if added else found
            subject.whole.release()
    reductions = [sentence for subject in subjects.values() for sentence in subject.whole.reductions]
    return known.model_copy(update=tasks | {"warnings": tuple(reductions)})


def base_of(path: Path) -> ModelSource:
    """Return the model that a finished run was compared with, at the commit that was read. Raises OutputError."""
    report = load_report(path)
    recipe = Recipe.parse(report.recipe_text, report.overrides, source=str(path / "recipe.yaml"))
    return _base(settle_first_base(recipe, report.lineage), report)


def _base(recipe: Recipe, report: Report) -> ModelSource:
    base = recipe.reference
    if report.provenance.commit and base == recipe.model:
        return base.model_copy(update={"revision": report.provenance.commit})
    return base


def _added_tasks(evaluation: Evaluation, earlier: Evaluation) -> tuple[str, ...]:
    """Return the tasks that the earlier settings do not have."""
    return tuple(task for task in evaluation.task_names if task not in earlier.task_names)


def _joined(before: TaskResults, added: TaskResults) -> TaskResults:
    return TaskResults(tasks=(*before.tasks, *added.tasks))


def _new_report(old: Report, recipe: Recipe, *, measured: Measured, folder: RunFolder) -> Report:
    """Return the old report with the new tasks, retention and verdict, and the costs of the evaluation."""
    return old.model_copy(
        update=judge_scores(measured, recipe.evaluation.gate).fields
        | {
            "created": now(),
            "recipe": recipe.model_dump(mode="json"),
            "overrides": recipe.overrides,
            "steps": old.steps + tuple(folder.steps),
            "warnings": tuple(dict.fromkeys((*old.warnings, *measured.warnings))),
            "files": {name: _in_folder(folder, file) for name, file in old.files.items()},
        }
    )


def _in_folder(folder: RunFolder, file: str) -> str:
    """Return the path of a run's file in the folder of the new report: below ``gguf``, or in the folder itself."""
    parts = Path(file).parts[-2:]
    return str(folder.path / Path(*(parts if parts[0] == GGUF_FILES else parts[-1:])))
