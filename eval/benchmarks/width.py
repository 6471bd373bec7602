"""Width criteria compared: every one on SmolLM2-135M-Instruct with half of each MLP gone, with refit or not.

    python eval/benchmarks/width.py DATA [taylor:absolute=token obs:ridge=0.1,shrinkage=0.5 …] [--no-refit]

DATA is a folder with c4_en.jsonl, wikipedia.jsonl and arc_easy_train.jsonl. Calibration is 16 × 512 tokens of C4;
judged are 8 × 512 tokens each of other C4, of Wikipedia and of school questions: like the calibration, less so
and unlike it. Nothing that a published figure is measured on is used, so that defaults may be chosen by it.
Without names, every criterion runs with its defaults. Rows of results/width.json are replaced by criterion and refit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SMOLLM2, record
from in_memory import BATCH, prune_in_memory
from pydantic import TypeAdapter
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.loading import load_tokenizer
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.criteria.base import WidthCriterion
from llmprune.data.windows import load_windows
from llmprune.evaluation.perplexity import perplexity
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.planning.sizes.planned_sizes import planned_widths
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut

KINDS = ("activation", "flap", "magnitude", "obs", "share", "share_taylor", "taylor", "wanda")
LENGTH = 512


def parse(text: str) -> WidthCriterion:
    """``obs:ridge=0.1,shrinkage=0.5`` as a criterion."""
    kind, _, settings = text.partition(":")
    pairs = [pair.split("=") for pair in settings.split(",") if pair]
    values = {key: value if kind == "taylor" else float(value) for key, value in pairs}
    criterion: WidthCriterion = TypeAdapter(WidthCriterion).validate_python({"kind": kind, **values})
    return criterion


def _texts(data: Path) -> dict[str, dict[str, str]]:
    return {
        "c4": {"dataset": str(data / "c4_en.jsonl")},
        "wikipedia": {"dataset": str(data / "wikipedia.jsonl")},
        "arc": {"dataset": str(data / "arc_easy_train.jsonl"), "text_field": "question"},
    }


class Bench:
    """The dense model, the calibration windows and the texts that judge."""

    def __init__(self, data: Path, folder: Path) -> None:
        source = ModelSource(id=SMOLLM2, dtype="float32")
        tokenizer = load_tokenizer(source)
        shape = {"samples": 16, "sequence_length": LENGTH}
        settings = Calibration.model_validate({**_texts(data)["c4"], "split": "train[:80%]", **shape})
        self.windows_NL = load_windows(settings, tokenizer, default_shape=settings.shape()).windows_NL
        self.judges: dict[str, Tensor] = {}
        for name, text in _texts(data).items():
            judge = Calibration.model_validate({"split": "train[80%:]", **text, **shape, "samples": 8})
            self.judges[name] = load_windows(judge, tokenizer, default_shape=judge.shape()).windows_NL
        self.dense = open_decoder(source)
        self.anatomy = discover(self.dense.skeleton.config)
        self.store = HiddenStateStore(None, folder, HiddenStateCache(folder / "cache", "bench"))
        self.folder = folder

    def row(self, text: str, refit: bool) -> dict[str, Any]:
        """Score, cut to half, repair and judge."""
        start = time.perf_counter()
        criterion = parse(text)
        scores = score(
            self.dense,
            self.anatomy,
            criteria=ScoringCriteria(width=criterion),
            calibration=CalibrationBatches(self.windows_NL, BATCH, self.store),
        )
        scored = time.perf_counter()
        width = Recipe.parse("{model: {id: x}, calibration: {dataset: x}, width: {mlp: 0.5}}").width
        widths = planned_widths(width, self.anatomy).kept
        cut = choose_cut(self.anatomy, scores, sizes=PlannedSizes((), self.anatomy.num_layers, widths=widths))
        result = prune_in_memory(
            self.dense, cut, anatomy=self.anatomy, refit=refit, windows=(self.windows_NL, None), store=self.store
        )
        ended = time.perf_counter()
        return {
            "criterion": text,
            "refit": refit,
            "seconds": {"pass 1": round(scored - start, 1), "pass 2": round(ended - scored, 1)},
            **self.judge(result),
        }

    def judge(self, decoder: Decoder) -> dict[str, float]:
        """Perplexity on each text."""
        return {
            name: round(perplexity(decoder, windows_NL, batch_size=BATCH, name=name), 3)
            for name, windows_NL in self.judges.items()
        }


def main() -> None:
    """Measure the criteria that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("criteria", nargs="*", default=KINDS)
    parser.add_argument("--no-refit", action="store_true")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    recorded = RESULTS / "width.json"
    rows = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data, Path(folder))
        dense = bench.judge(bench.dense)
        for text in arguments.criteria:
            row = bench.row(text, not arguments.no_refit)
            rows = [old for old in rows if (old["criterion"], old["refit"]) != (text, row["refit"])] + [row]
            record("width", {"dense": dense, "rows": rows})


if __name__ == "__main__":
    main()
