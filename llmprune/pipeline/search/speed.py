"""Speed of shapes in a search: predicted from a table of times by part, and measured for the shape that is chosen."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.errors import ModelError
from llmprune.cut.shape import Shape
from llmprune.evaluation.bench.measured_shape import measure_shape
from llmprune.evaluation.bench.speed_prediction import predict
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.evaluation.bench.speed_table import speed_table
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.search.figures import shape_of_tried
from llmprune.pipeline.step_costs import measure_step
from llmprune.recipe.evaluation import Speed
from llmprune.results.figures.search import SearchFigures
from llmprune.results.figures.speed_table import SpeedTable
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import SPEEDS

logger = logging.getLogger(__name__)

SPEED_TABLE = "speed table"  # step


@dataclass(frozen=True)
class ShapeSpeeds:
    """Speeds of the shapes of one model, times the dense model's. ``is_here``: the table was measured here."""

    subject: SpeedSubject
    settings: Speed
    table: SpeedTable
    is_here: bool

    @classmethod
    def of(cls, context: RunContext) -> ShapeSpeeds | None:
        """Read or measure the table that a budget with a speed needs; None for another budget.

        Raises RecipeError for a wrong file, EvaluationError where the machine is too noisy to tell the speed.
        """
        recipe, budget = context.recipe, context.recipe.budget
        if budget is None or budget.speed is None:
            return None
        subject = SpeedSubject.of(recipe.model, config=context.inputs.config, anatomy=context.inputs.anatomy)
        settings, file = budget.speed_settings, budget.speed_table
        asked, folder = min(budget.limits["speed"]), context.folder
        given = [Path(file).expanduser()] if file else []

        def make() -> SpeedTable:
            with measure_step(folder.steps, SPEED_TABLE):
                return speed_table(subject, settings=settings, asked=asked, file=file)

        table = folder.produce_figures(
            SPEED_TABLE,
            fingerprint(context.inputs.identity, settings, asked, file, file_fingerprint(*given)),
            file=SPEEDS,
            kind=SpeedTable,
            make=make,
        )
        return cls(subject, settings, table, is_here=file is None)

    def predicted(self, shape: Shape) -> float:
        """Return the predicted speed of a shape."""
        return predict(self.table, shape).ratio

    def with_measured(self, found: SearchFigures) -> SearchFigures:
        """Return the figures of a search with the measured speeds of the shapes that it chose."""
        speeds = [self.measured(shape_of_tried(found, found.chosen_shape(size))) for size in found.sizes]
        pairs = zip(found.chosen, speeds, strict=True)
        chosen = tuple(one.model_copy(update={"measured_speed": speed}) for one, speed in pairs)
        return found.model_copy(update={"chosen": chosen})

    def measured(self, shape: Shape) -> float | None:
        """Return the speed of whole generations by a shape with random weights, timed in turn with the dense model.

        Every process gets what the first one measures. None where the table is that of another machine, or where both
        models do not fit in memory together.
        """
        return broadcast_from_first(self._measured(shape) if self.is_here and is_first_process() else None)

    def _measured(self, shape: Shape) -> float | None:
        try:
            return measure_shape(self.subject, shape, settings=self.settings).ratio
        except ModelError as error:
            logger.warning("the speed of %s is not measured: %s", shape.name, error)
            return None
