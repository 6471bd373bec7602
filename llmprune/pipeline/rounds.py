"""Rounds before the last of a run that cuts and trains several times.

Each is a run of its own in ``rounds/N`` of the run folder, with its own journal, so that a run that is killed continues
within a round. The last round is the outer run: it cuts the model of the round before. A round that is finished keeps
its figures and its cut, the last of them also its model, which the outer run reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from llmprune.checkpoint.result.pruned_source import pruned_source
from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.errors import LLMPruneError, ModelError
from llmprune.common.files import write_text
from llmprune.common.progress import more_runs_follow, report_progress
from llmprune.data.recovery_windows import Part
from llmprune.data.windows import fingerprint_tokens
from llmprune.pipeline.batches import Batches
from llmprune.pipeline.context import AmongRounds, EarlierRounds, RunContext
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.report.composed_layers import compose_layers, layers_left
from llmprune.pipeline.scored_sizes import criteria_of
from llmprune.planning.checks import ErrorCollector
from llmprune.planning.plan import PlanningOutcome, plan_structure
from llmprune.planning.rounds.recipes import round_recipes
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.publish.generated_windows import GENERATED, GENERATED_FOR_RECOVERY
from llmprune.recipe.recipe import Recipe
from llmprune.results.load_report import load_report
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.fingerprints import fingerprint
from llmprune.results.run_folder.products import (
    GENERATED_WINDOWS,
    JOURNAL,
    PREDICTIONS,
    RECOVERY_WINDOWS,
    REPAIRED,
    ROUNDS,
    SCORES,
)
from llmprune.results.run_folder.replacing import is_same_recipe, recipe_of_model, remove


class RunRound(Protocol):
    """Function that runs one round."""

    def __call__(
        self, outcome: PlanningOutcome, output: Path, *, generated: Mapping[str, Path], among: AmongRounds
    ) -> Report:
        """Run a round in its folder. ``generated``: files of windows that it takes, by their names when published."""
        ...


_LARGE = (REPAIRED, SCORES)  # that no later round reads
_WEIGHTS, _MOST_ROUNDS = "*.safetensors", 10


def after_earlier_rounds(
    context: RunContext, text: TextInputs, *, generated: Mapping[str, Path], run: RunRound
) -> tuple[RunContext, dict[str, Path]]:
    """Run the rounds before the last; return the last one's context, and the files of windows that it takes.

    ``text``: inputs of the whole recipe, which are read; ``generated``: files of windows that the first round takes.
    Every process calls this. Raises what a run raises.
    """
    rounds = _Rounds(context, text, context.folder.home / ROUNDS)
    reports = rounds.finished()
    for number in range(1, len(rounds.recipes)):
        if number > len(reports):
            taken = generated if number == 1 else rounds.generated()
            reports.append(rounds.run(number, reports, run=partial(run, generated=taken, among=rounds.among(reports))))
        rounds.tidy(number)
    last = rounds.plan_round(len(rounds.recipes), reports)
    (plan, anatomy), recipe = last.require(), last.texts.recipe
    inputs = RunInputs(recipe, anatomy, texts=last.texts, reserve=context.inputs.reserve, devices=plan.devices)
    earlier = EarlierRounds(context.recipe, context.plan, tuple(reports))
    batches = Batches.planned(plan.batch_sizes)
    found = replace(
        context, recipe=recipe, plan=plan, inputs=inputs, batches=batches, earlier=earlier, among=rounds.among(reports)
    )
    if context.search is not None:  # its scores are of the model before the first round, and of every axis
        found = replace(found, search=replace(context.search, scores=None, criteria=criteria_of(recipe)))
    return found, rounds.generated()


@dataclass(frozen=True)
class _Rounds:
    """Rounds of one run. ``folder``: of all of them."""

    context: RunContext
    text: TextInputs
    folder: Path

    @cached_property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipe of each round, all with the model of the first."""
        return round_recipes(self.context.recipe, self.context.inputs.anatomy)

    @cached_property
    def _origin(self) -> str:
        """Fingerprint of the model, the code and the texts of all rounds."""
        inputs = self.context.inputs
        texts, held_out = [], inputs.held_out_text
        if self.recipes[0].recover and self.recipes[0].recover.tokens is not None:
            found = inputs.texts.recovery_text(inputs.texts.recovery_number())
            texts = [fingerprint_tokens(part) for one in found.sources for part in (one.train_NL, one.held_out_HL)]
        return fingerprint(
            inputs.identity, inputs.text_fingerprint, held_out.fingerprint() if held_out else None, *texts
        )

    def generated(self) -> dict[str, Path]:
        """Return the files of windows that the dense model wrote in the first round, by their names when published."""
        files = {GENERATED: GENERATED_WINDOWS, GENERATED_FOR_RECOVERY: RECOVERY_WINDOWS}
        places = {name: self.folder / "1" / file for name, file in files.items()}
        return {name: path for name, path in places.items() if path.is_file()}

    def among(self, reports: Sequence[Report]) -> AmongRounds:
        """Return the place of the round that follows those of the reports."""
        layers = range(self.context.inputs.anatomy.num_layers)
        left = layers_left(compose_layers([report.layers for report in reports])) if reports else layers
        return AmongRounds(tuple(left), self.folder / PREDICTIONS)

    def finished(self) -> list[Report]:
        """Return the reports of the first rounds that are finished, if the last of these still has its model."""
        return broadcast_from_first(self._finished() if is_first_process() else [])

    def _finished(self) -> list[Report]:
        reports: list[Report] = []
        for number, recipe in enumerate(self.recipes[:-1], start=1):
            try:
                record = json.loads(self._record(number).read_text(encoding="utf-8"))
                wanted = recipe_of_model(recipe)
                if record["origin"] != self._origin or not is_same_recipe(record["recipe"], wanted, locations=False):
                    break
                reports.append(load_report(self.folder / str(number)))
            except (OSError, ValueError, KeyError, LLMPruneError):
                break
        return reports if reports and any((self.folder / str(len(reports)) / "model").glob(_WEIGHTS)) else []

    def run(self, number: int, reports: Sequence[Report], *, run: Callable[[PlanningOutcome, Path], Report]) -> Report:
        """Run a round in its folder, or continue it, and record that it is finished."""
        rounds, folder = len(self.recipes), self.folder / str(number)
        outcome = self.plan_round(number, reports)
        plan, recipe = outcome.require()[0], outcome.texts.recipe
        if plan.shortage:
            raise ModelError(f"round {number} of {rounds}: {plan.shortage}")
        if is_first_process():
            self._discard(number, recipe)
            folder.mkdir(parents=True, exist_ok=True)
        report_progress(f"round {number} of {rounds}: to {plan.pruned.layers} layers")
        with more_runs_follow():
            report = run(outcome, folder)
        if is_first_process():
            record = {"recipe": recipe_of_model(self.recipes[number - 1]), "origin": self._origin}
            write_text(self._record(number), json.dumps(record, indent=1) + "\n")
        return report

    def plan_round(self, number: int, reports: Sequence[Report]) -> PlanningOutcome:
        """Return the plan of a round on the model that the round before left."""
        recipe = self.recipes[number - 1]
        model = recipe.model
        for before, report in enumerate(reports[: number - 1], start=1):
            layers = [row.layer for row in report.layers if not row.removed]
            model = pruned_source(model, self.folder / str(before) / "model", layers=layers)
        recipe = recipe.derived({"model": model})
        errors = ErrorCollector()
        plan, anatomy = plan_structure(recipe, errors)
        inputs = self.text.of_round(recipe, Part(number, len(self.recipes)))
        return PlanningOutcome(plan, anatomy, inputs, errors)

    def tidy(self, number: int) -> None:
        """Remove what no later round reads of a finished one, and the weights of the round before it."""
        if is_first_process():
            for name in _LARGE:
                remove(self.folder / str(number) / name)
            for path in (self.folder / str(number - 1) / "model").glob(_WEIGHTS):
                remove(path)

    def _record(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _discard(self, number: int, recipe: Recipe) -> None:
        """Remove later rounds, and what another recipe began in the folder of this one."""
        for later in range(number + 1, _MOST_ROUNDS + 1):
            remove(self.folder / str(later))
        for later in range(number, _MOST_ROUNDS + 1):
            remove(self._record(later))
        folder = self.folder / str(number)
        try:
            begun = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
            begun = None
        if begun is None or not is_same_recipe(begun, recipe_of_model(recipe), locations=True):
            remove(folder)
