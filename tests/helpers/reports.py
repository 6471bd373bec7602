"""Handmade reports, and the pages, cards and tables that show them."""

from __future__ import annotations

import io
import math
from typing import Any

from huggingface_hub import ModelCard
from rich.console import Console

from helpers.hub.repositories import wrong_metadata
from llmprune.publish.card import Base, CardFacts, Loading, write_card
from llmprune.report.run_table import print_summary
from llmprune.results.figures.calibration import CalibrationSource
from llmprune.results.figures.evaluation import (
    BarFigures,
    DivergenceFigures,
    Example,
    FreeText,
    GateFigures,
    GenerationFigures,
    Interval,
    PerplexityFigures,
    RetentionFigures,
    SpeedFigures,
    TaskFigures,
    Verdict,
)
from llmprune.results.figures.layers import LayerFigures
from llmprune.results.figures.model_size import Size
from llmprune.results.figures.provenance import Provenance, Step
from llmprune.results.figures.result_files import VerificationFigures
from llmprune.results.report_schema import Report

COMMIT = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
RECIPE = """\
# SmolLM2-135M: three layers and a quarter of every MLP
model: {id: HuggingFaceTB/SmolLM2-135M}
calibration: {dataset: calibration.jsonl, samples: 128, sequence_length: 1024}
depth: {remove: 3}
width: {mlp: 0.75}
refit: {ridge: 0.01}
evaluation:
  tasks: [arc_easy, blimp_anaphor, squad_completion]
  gate: {min_retention: 0.9}
"""
REMOVED = (12, 20, 21)
NAME = "org/SmolLM2-pruned"
BASE = Base("HuggingFaceTB/SmolLM2-135M", COMMIT, {"license": "apache-2.0", "language": ["en"], "tags": ["x"]})
PLAIN = Loading("AutoModelForCausalLM", tokenizer=True, remote_code=False)


PROVENANCE = Provenance(
    model="HuggingFaceTB/SmolLM2-135M",
    revision="main",
    commit=COMMIT,
    calibration_fingerprint="5be1c7a09d2f4e83b6c0",
    calibration_tokens=131072,
    calibration_sources=(
        CalibrationSource(
            name="web",
            text="allenai/c4",
            config="en",
            split="train",
            commit=COMMIT,
            licence="ODC-By 1.0",
            windows=48,
            tokens=98304,
            documents=210,
        ),
        CalibrationSource(name="self_generated", windows=16, tokens=32768),
    ),
    seed=0,
    trust_remote_code=False,
    device="cpu, 2 threads",
    processes=2,
    batch_size=8,
    versions={"llmprune": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0"},
)
DENSE = Size(
    parameters=134515008,
    bytes=269030016,
    layers=30,
    widths={"intermediate_size": 1536},
    experts=None,
    kv_bytes_per_token=23040,
)
PRUNED = Size(
    parameters=105978816,
    bytes=211957632,
    layers=27,
    widths={"intermediate_size": 1152},
    experts=None,
    kv_bytes_per_token=20736,
)
PERPLEXITY = PerplexityFigures(dense=15.21, cut=47.36, pruned=21.94, tokens=65536, source="wikitext2_test.txt")
RETENTION = RetentionFigures(
    retention=0.9483,
    interval=Interval(low=0.9214, high=0.9741, confidence=0.95),
    counted=("arc_easy", "blimp_anaphor_gender_agreement"),
    left_out=("squad_completion",),
    samples=1000,
)
DIVERGENCE = DivergenceFigures(
    mean=0.184,
    quantiles={"0.5": 0.061, "0.9": 0.472, "0.99": 1.66, "1.0": 9.21},
    same_first=0.861,
    tokens=65472,
)
GENERATION = GenerationFigures(
    dense=FreeText(repetition=0.212, loops=0.125, empty=0.0, tokens=61.2),
    pruned=FreeText(repetition=0.274, loops=0.1875, empty=0.0625, tokens=58.8),
    text=FreeText(repetition=0.008, loops=0.0, empty=0.0, tokens=64),
    samples=16,
    prompt_tokens=32,
    new_tokens=64,
    examples=(
        Example(
            prompt="The game takes place during the Second Europan War. Gallian Army Squad 422, also known as",
            dense=" the Nameless, is a penal military unit composed of criminals and deserters.",
            pruned=" the Nameless, is a unit of the army, and the unit of the army is a unit of the army.",
        ),
    ),
)
SPEED = SpeedFigures(
    dense=18.4,
    pruned=22.9,
    ratio=1.243,
    ratio_low=1.21,
    ratio_high=1.27,
    batch_size=1,
    prompt_tokens=64,
    new_tokens=32,
    repeats=5,
    device="cpu, 2 threads",
)
VERIFICATION = VerificationFigures(
    parameters=105978816, largest_logit_difference=0.0, cached_generation_equal=True, positions=512
)
STEPS = (
    Step(name="plan", seconds=0.83, reused=False),
    Step(name="score", seconds=74.2, reused=True),
    Step(name="prune", seconds=192.6, reused=False, estimated_seconds=181.0, peak_device=3 * 10**9),
    Step(name="verify", seconds=14.1, reused=False),
    Step(name="evaluate", seconds=605.0, reused=False),
)
WARNINGS = (
    "width.mlp: 0.75 of 1536 neurons is 1152, kept as it is: a multiple of 128.",
    "evaluation.limit: 500 of 2376 samples were used; scores are less certain than the whole task's.",
)


def sample_layers(count: int = 30, removed: tuple[int, ...] = REMOVED) -> tuple[LayerFigures, ...]:
    """Return layers with high importance at both ends, and errors that grow with depth."""
    layers = []
    for layer in range(count):
        depth = layer / max(count - 1, 1)
        importance = 0.026 + 0.42 * math.exp(-28 * depth) + 0.16 * math.exp(-30 * (1 - depth)) + layer % 5 * 0.004
        gone = layer in removed
        layers.append(
            LayerFigures(
                layer=layer,
                importance=0.017 + 0.0004 * layer if gone else importance,
                removed=gone,
                width=1536,
                kept=None if gone else 1152,
                score_share=None if gone else 0.91 + 0.06 * depth,
                error_cut=None if gone else 0.11 + 0.42 * depth + layer % 3 * 0.012,
                error_refit=None if gone else 0.07 + 0.24 * depth + layer % 3 * 0.006,
            )
        )
    return tuple(layers)


def sample_report(**changes: Any) -> Report:
    """Return the report of SmolLM2-135M with 3 of 30 layers removed and MLPs narrowed from 1536 to 1152 neurons."""
    values: dict[str, Any] = {
        "created": "2026-03-14 09:26 UTC",
        "recipe": {"model": {"id": "HuggingFaceTB/SmolLM2-135M"}, "depth": {"remove": 3}},
        "recipe_text": RECIPE,
        "overrides": ("refit.ridge=0.02", "evaluation.limit=500"),
        "provenance": PROVENANCE,
        "dense": DENSE,
        "pruned": PRUNED,
        "layers": sample_layers(),
        "perplexity": PERPLEXITY,
        "divergence": DIVERGENCE,
        "tasks": sample_tasks(),
        "mean_retention": RETENTION.retention,
        "retention": RETENTION,
        "generation": GENERATION,
        "speed": SPEED,
        "gate": gate(0.9),
        "verification": VERIFICATION,
        "steps": STEPS,
        "warnings": WARNINGS,
        "files": {"model": "smollm2-pruned/model", "page": "smollm2-pruned/report.html"},
    }
    return Report(**values | changes)


def sample_tasks() -> tuple[TaskFigures, ...]:
    """Return three tasks, the last of them without flips and interval."""
    return (
        task("arc_easy", "acc_norm", dense=0.586, pruned=0.544, flips=(41, 20)),
        task("blimp_anaphor_gender_agreement", "acc", dense=0.874, pruned=0.852, flips=(19, 8)),
        task("squad_completion", "contains", dense=0.412, pruned=0.388, flips=None),
    )


def gate(least: float, verdict: Verdict = "pass", needed: int | None = None) -> GateFigures:
    """Return a gate with one bar, for the mean."""
    bar = BarFigures(
        name="mean",
        minimum=least,
        measured=0.9483,
        interval=Interval(low=0.9214, high=0.9741, confidence=0.95),
        verdict=verdict,
        samples=1000,
        samples_needed=needed,
        reason="its metric is not a mean over samples" if verdict == "no interval" else None,
    )
    passed = verdict == "pass"
    return GateFigures(
        min_retention=least, retention=0.9483, passed=passed, confidence=0.95, verdict=verdict, bars=(bar,)
    )


def task(name: str, metric: str, *, dense: float, pruned: float, flips: tuple[int, int] | None) -> TaskFigures:
    """Return a task on 500 samples; ``flips``: lost and gained samples, without which it has no interval."""
    retention = pruned / dense
    lost, gained = flips or (None, None)
    return TaskFigures(
        task=name,
        metric=metric,
        dense=dense,
        pruned=pruned,
        retention=retention,
        interval=Interval(low=retention - 0.03, high=retention + 0.028, confidence=0.95) if flips else None,
        samples=500,
        documents=2376,
        lost=lost,
        gained=gained,
        p_value=0.0123 if flips else None,
    )


def bare_report() -> Report:
    """Return a report without any optional part."""
    bare = sample_report()
    unknown = {"widths": {}, "kv_bytes_per_token": None}
    nothing = {"revision": None, "commit": None, "calibration_fingerprint": None, "calibration_tokens": None}
    nothing["calibration_sources"] = ()
    return sample_report(
        overrides=(),
        provenance=bare.provenance.model_copy(update={**nothing, "versions": {}}),
        dense=bare.dense.model_copy(update=unknown),
        pruned=bare.pruned.model_copy(update=unknown),
        layers=(),
        perplexity=None,
        tasks=(),
        mean_retention=None,
        retention=None,
        divergence=None,
        generation=None,
        speed=None,
        gate=None,
        steps=(),
        warnings=(),
        files={},
    )


def summary(report: Report) -> str:
    """Return the summary as a terminal of 80 columns prints it."""
    printed = io.StringIO()
    print_summary(report, Console(file=printed, width=80))
    return printed.getvalue()


def with_confidence(confidence: float) -> Report:
    """Return a report whose intervals have this confidence."""
    report = sample_report(gate=None)
    assert report.retention is not None
    other = {"interval": Interval(low=0.9, high=0.97, confidence=confidence)}
    tasks = tuple(figures.model_copy(update=other) if figures.interval else figures for figures in report.tasks)
    return report.model_copy(update={"tasks": tasks, "retention": report.retention.model_copy(update=other)})


def card(report: Report | None = None, base: Base = BASE, loading: Loading = PLAIN, **options: Any) -> ModelCard:
    """Return the model card of a report, parsed as the hub parses it."""
    given = {"refused": None, "plots": ("importance", "error")} | options
    given["facts"] = CardFacts(base, loading, given.pop("refused"))
    written = ModelCard(write_card(NAME, report or sample_report(), **given))
    assert wrong_metadata(written.data.to_dict()) == []
    return written
