"""Measured speed of a shape, end to end, before a checkpoint of it exists."""

from __future__ import annotations

from llmprune.cut.shape import Shape
from llmprune.evaluation.bench.generation_speed import clock_of_models_in_memory, compare_speed
from llmprune.evaluation.bench.random_models import random_models
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.evaluation.whole_model import WholeModel
from llmprune.recipe.evaluation import Speed
from llmprune.results.figures.evaluation import SpeedFigures


def measure_shape(subject: SpeedSubject, shape: Shape, *, settings: Speed) -> SpeedFigures:
    """Time the dense model and one of this shape in turn, both with random weights.

    Raises ModelError where both do not fit in memory together, or where a config cannot express the shape.
    """
    dense, pruned = random_models(subject, (subject.shape, shape))
    return compare_speed(
        WholeModel(lambda: dense),
        WholeModel(lambda: pruned),
        settings=settings,
        together=True,
        clock=clock_of_models_in_memory(subject.device),
    )
