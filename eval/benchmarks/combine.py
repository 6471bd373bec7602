"""Rules of ``calibration.combine`` compared: SmolLM2-135M-Instruct, judged on kinds of text that are not calibrated on.

    python eval/benchmarks/combine.py DATA [--refit] [name=text.jsonl …]

DATA is a folder with c4_en.jsonl, wikipedia.jsonl, arc_easy_train.jsonl, wikitext2_valid_unk.txt and
gsm8k_test.jsonl. Calibration is 16 × 512 tokens each of the first four; judged are 4 × 512 tokens each of GSM8K, of
Python's manual and of the files that are named. An excess is ln(perplexity / dense). Neurons are scored by ``share``,
layers by ``block_influence``; with --refit all calibration windows repair the cut, and the sources are the folds.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from common import SMOLLM2, TOPICS, record
from in_memory import BATCH, prune_in_memory
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.loading import load_tokenizer
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.criteria.combine import Combine
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.share import Share
from llmprune.cut.decision import Cut
from llmprune.data.window_sources import sources_of_windows
from llmprune.data.windows import load_windows
from llmprune.evaluation.perplexity import perplexity
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.model import ModelSource
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut

LENGTH = 512
TARGETS = {"a quarter of each MLP": (0.75, 0), "half of each MLP": (0.5, 0), "3 layers": (1.0, 3)}


class Bench:
    """The dense model, the calibration windows of four kinds, and the texts that judge."""

    def __init__(self, data: Path, texts: dict[str, str], folder: Path) -> None:
        source = ModelSource(id=SMOLLM2, dtype="float32")
        self.tokenizer, self.dense = load_tokenizer(source), open_decoder(source)
        self.anatomy, self.store = discover(self.dense.skeleton.config), HiddenStateStore(None, folder, None)
        kinds = [
            {"dataset": str(data / name)} for name in ("c4_en.jsonl", "wikipedia.jsonl", "wikitext2_valid_unk.txt")
        ]
        kinds.append({"dataset": str(data / "arc_easy_train.jsonl"), "text_field": "question"})
        calibration = Calibration.model_validate(
            {"sources": kinds, "samples": 64, "sequence_length": LENGTH, "self_generated": 0}
        )
        self.windows_NL = load_windows(calibration, self.tokenizer, default_shape=calibration.shape()).windows_NL
        self.sources_N = sources_of_windows(calibration)
        judges: dict[str, dict[str, Any]] = {
            "manual": TOPICS,
            **{name: {"dataset": path} for name, path in texts.items()},
        }
        judges["gsm8k"] = {"dataset": str(data / "gsm8k_test.jsonl"), "text_field": "question"}
        self.judges = {name: self._windows(text) for name, text in judges.items()}

    def _windows(self, text: dict[str, Any]) -> Tensor:
        settings = Calibration.model_validate({**text, "samples": 4, "sequence_length": LENGTH})
        return load_windows(settings, self.tokenizer, default_shape=settings.shape()).windows_NL

    @cache  # noqa: B019 - one bench a process
    def scores(self, rule: Combine) -> Scores:
        """Scores of all neurons and layers by a rule."""
        sources_N = None if rule == "pooled" else self.sources_N
        return score(
            self.dense,
            self.anatomy,
            criteria=ScoringCriteria(BlockInfluence(), Share()),
            calibration=CalibrationBatches(self.windows_NL, BATCH, self.store, sources_N=sources_N, combine=rule),
            target=DepthTarget(3),
        )

    def judge(self, decoder: Decoder) -> dict[str, float]:
        """Perplexity on each text."""
        return {
            name: perplexity(decoder, windows_NL, batch_size=BATCH, name=name)
            for name, windows_NL in self.judges.items()
        }

    def pruned(self, cut: Cut, *, refit: bool) -> Decoder:
        """The model of a cut, refit or not."""
        windows = (self.windows_NL, self.sources_N) if refit else (self.windows_NL[:1], None)
        return prune_in_memory(self.dense, cut, anatomy=self.anatomy, refit=refit, windows=windows, store=self.store)

    def cut(self, rule: Combine, target: str) -> Cut:
        """The cut to a target that the scores by a rule choose."""
        width, depth = TARGETS[target]
        widths = {field: int(width * full) for field, full in self.anatomy.widths.items()} if width < 1 else {}
        layers = self.anatomy.num_layers
        return choose_cut(
            self.anatomy, self.scores(rule), sizes=PlannedSizes(None if depth else (), layers - depth, widths)
        )


def main() -> None:
    """Measure every rule on every target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--refit", action="store_true")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data, dict(text.split("=", 1) for text in arguments.texts), Path(folder))
        dense, rows = bench.judge(bench.dense), {}
        for target in TARGETS:
            for rule in get_args(Combine):
                found = bench.judge(bench.pruned(bench.cut(rule, target), refit=arguments.refit))
                excess = {name: round(math.log(found[name] / dense[name]), 3) for name in dense}
                rows[f"{target}, {rule}"] = excess | {"mean": round(sum(excess.values()) / len(excess), 3)}
                sys.stderr.write(f"{target}, {rule}: {rows[f'{target}, {rule}']}\n")
        record("combine_refit" if arguments.refit else "combine", {"dense": dense, "excess": rows})


if __name__ == "__main__":
    main()
