"""Predicted and measured generation speed of shapes of SmolLM2-135M, with random weights of its sizes.

    OMP_NUM_THREADS=1 python eval/benchmarks/speed_prediction.py [24/1536/3 30/768/3 …] [--repeats 5]

A shape is given as layers/neurons/key-value groups. The table of times by part is measured once. Then each shape and
the dense model generate in turn, and both ratios of the shape's speed to the dense model's are recorded. Speed is new
tokens per second, prefill and decoding together. With one thread the times are processor times, which other programs on
the machine change little.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from common import SMOLLM2, record

from llmprune.cut.shape import Shape
from llmprune.evaluation.bench.measured_shape import measure_shape
from llmprune.evaluation.bench.speed_measurement import measure_speed_table
from llmprune.evaluation.bench.speed_prediction import predict
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.recipe.evaluation import Speed
from llmprune.recipe.model import ModelSource

SHAPES = ("24/1536/3", "30/768/3", "30/1536/2", "26/1152/2", "20/1280/3")


def parse(text: str, subject: SpeedSubject) -> Shape:
    """``24/1536/3`` as a shape of the model."""
    layers, width, groups = map(int, text.split("/"))
    (field,) = subject.anatomy.widths
    return replace(subject.shape, layers=layers, widths=((field, width),), kv_groups=groups)


def main() -> None:
    """Measure the table, and the shapes that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    subject = SpeedSubject.of(ModelSource(id=SMOLLM2))
    settings = Speed(prompt_tokens=given.prompt_tokens, new_tokens=given.new_tokens, repeats=given.repeats)
    start = time.perf_counter()
    table = measure_speed_table(subject, settings=settings)
    head = {
        "settings": settings.model_dump(),
        "table": table.model_dump(mode="json"),
        "table_seconds": round(time.perf_counter() - start, 1),
        "table_uncertainty": round(table.uncertainty, 4),
    }
    rows = []
    for text in given.shapes:
        shape = parse(text, subject)
        predicted, measured = predict(table, shape), measure_shape(subject, shape, settings=settings)
        rows.append(
            {
                "shape": shape.name,
                "predicted_ratio": round(predicted.ratio, 3),
                "measured_ratio": round(measured.ratio, 3),
                "measured_low": round(measured.ratio_low, 3),
                "measured_high": round(measured.ratio_high, 3),
                "off": round(predicted.ratio / measured.ratio - 1, 3),
                "predicted_tokens_per_second": round(predicted.tokens_per_second, 2),
                "measured_tokens_per_second": round(measured.pruned, 2),
            }
        )
        record("speed_prediction", head | {"rows": rows})


if __name__ == "__main__":
    main()
