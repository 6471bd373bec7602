"""Excess of each cut of any model on texts left out of its calibration: ``quality.py DATA --model FOLDER``.

Calibration is 128 windows of C4, Wikipedia and ARC's questions. Windows have the model's length, at most 512, and begin
as its tokenizer begins a text. Excess is ln(perplexity / dense perplexity) in exact float32; lower is better.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import record, report_of, write_recipe
from texts import calibration_sources, given_documents, judging_documents, perplexity, windows_of
from transformers import AutoConfig, AutoTokenizer

from llmprune import Recipe, run

TARGETS: dict[str, dict[str, Any]] = {
    "mlp-25": {"width": {"mlp": 0.75}},
    "mlp-50": {"width": {"mlp": 0.5}},
    "depth-1": {"depth": {"remove": 1}},
    "depth-1 and mlp-25": {"depth": {"remove": 1}, "width": {"mlp": 0.75}},
    "depth-2": {"depth": {"remove": 2}},
    "depth-2 and mlp-25": {"depth": {"remove": 2}, "width": {"mlp": 0.75}},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class JudgedModel:
    """A checkpoint, its windows by kind of text, its dense perplexity on them, and the section of its calibration."""

    folder: Path
    windows: dict[str, torch.Tensor]
    dense: dict[str, float]
    calibration: dict[str, Any]


def judged_model(folder: Path, data: Path, *, samples: int, judged: int, further: Sequence[str] = ()) -> JudgedModel:
    """Measure the dense model.

    ``samples``: calibration windows; ``judged``: windows of each kind of text; ``further``: texts as NAME=FILE.
    """
    windows, calibration = judged_texts(folder, data, samples=samples, judged=judged, further=further)
    dense = {kind: perplexity(folder, windows_NL, exact=True) for kind, windows_NL in windows.items()}
    return JudgedModel(folder, windows, dense, calibration)


def judged_texts(
    folder: Path, data: Path, *, samples: int, judged: int, further: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return windows of each kind of text to judge a checkpoint on, and the section of its calibration."""
    length = min(512, AutoConfig.from_pretrained(folder).max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = {
        kind: windows_of(documents, tokenizer, count=judged, length=length)
        for kind, documents in (judging_documents(data) | given_documents(further)).items()
    }
    return windows, {"samples": samples, "sequence_length": length, "sources": calibration_sources(data)}


def measure(model: JudgedModel, target: str, overrides: Sequence[str], folder: Path) -> Row:
    """Prune to one target in a folder, and measure the checkpoint."""
    source = {"id": str(model.folder), "dtype": "float32"}
    recipe = write_recipe(folder / "recipe.yaml", source, model.calibration, **TARGETS[target])
    shutil.rmtree(folder / "run" / "model", ignore_errors=True)  # of other settings; the folder's scores serve again
    run(Recipe.load(recipe, overrides), folder / "run")
    report = report_of(folder / "run")
    found = {kind: perplexity(folder / "run" / "model", ids_NL, exact=True) for kind, ids_NL in model.windows.items()}
    return {
        "target": target,
        "settings": list(overrides),
        "parameters": report["pruned"]["parameters"],
        "removed": [layer["layer"] for layer in report["layers"] if layer["removed"]],
        "excess": {kind: round(math.log(value / model.dense[kind]), 4) for kind, value in found.items()},
    }


def measure_targets(model: JudgedModel, targets: Sequence[str], settings: Sequence[list[str]], results: Path) -> None:
    """Measure targets, or all where none is named, with each of the settings; record the rows by target and settings.

    The record is ``quality-NAME.json`` in ``results``, with the name of the model's folder. Rows of another dense model
    under that name are dropped.
    """
    name = f"quality-{model.folder.resolve().name}"
    dense = {kind: round(value, 3) for kind, value in model.dense.items()}
    rows = _rows_of(results / f"{name}.json", dense)
    for target in targets or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            for overrides in settings:
                row = measure(model, target, overrides, Path(folder))
                rows = [old for old in rows if (old["target"], old["settings"]) != (target, row["settings"])] + [row]
                record(name, {"dense": dense, "calibration": described(model.calibration), "rows": rows}, results)
    print(_table(dense, rows))


def _rows_of(path: Path, dense: dict[str, float]) -> list[Row]:
    figures: dict[str, Any] = json.loads(path.read_text())["figures"] if path.is_file() else {}
    return figures["rows"] if figures.get("dense") == dense else []


def described(calibration: dict[str, Any]) -> str:
    """Return the name of a calibration."""
    return f"C4, Wikipedia and ARC's questions, {calibration['samples']} x {calibration['sequence_length']}"


def _table(dense: dict[str, float], rows: Sequence[Row]) -> str:
    """Perplexities of the dense model, then the excess of each row, by kind of text."""
    head = f"{'target':<20} {'settings':<28} " + " ".join(f"{kind:>10}" for kind in dense)
    lines = [head, f"{'dense, perplexity':<49} " + " ".join(f"{value:>10.2f}" for value in dense.values())]
    for row in rows:
        values = " ".join(f"{row['excess'][kind]:>10.3f}" for kind in dense)
        lines.append(f"{row['target']:<20} {' '.join(row['settings']) or 'default':<28} {values}")
    return "\n".join(lines)
