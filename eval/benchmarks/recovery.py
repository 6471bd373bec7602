"""Training after the cut: perplexity before and after it, on text that neither calibration nor training saw.

    python eval/benchmarks/recovery.py DATA TARGET [--tokens 500K] [--set A.B=C] [--text NAME=FILE …] [--run FOLDER]

SmolLM2-135M-Instruct is pruned to TARGET (those of ``quality.py``) with four kinds of text in the folder DATA, 64 x 512
tokens, and trained on more of them. The repaired and the trained checkpoint and the dense model are judged in exact
float32 on WikiText's test text, the held-out part of C4, GSM8K's test questions with answers, and Python's manual, and
on files of plain text by ``--text``; ``--judged`` windows of 512 tokens each. ``--run`` judges a finished run instead.
Rows of results/recovery.json are replaced by target, tokens and settings.
Excess is ln(perplexity / dense perplexity); lower is better.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, SMOLLM2, finish, record, report_of, run, write_recipe
from quality import TARGETS, UNSEEN, mixed
from texts import given_documents, judging_documents, perplexity, perplexity_of, windows_of
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmprune.checkpoint.loading import load_model
from llmprune.recipe.model import ModelSource

WIKITEXT = "wikitext2_test.txt"  # in DATA


def judged_windows(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return windows of 512 tokens by the name of the text."""
    documents = {kind: judging_documents(arguments.data)[kind] for kind in UNSEEN}
    documents["wikitext"] = [(arguments.data / WIKITEXT).read_text(encoding="utf-8")]
    documents |= given_documents(arguments.text)
    return {name: windows_of(texts, tokenizer, count=arguments.judged, length=512) for name, texts in documents.items()}


def prune_and_train(arguments: argparse.Namespace, folder: Path) -> Path:
    """Run the recipe; return the run folder, with the checkpoints before and after the training."""
    section = mixed(arguments.data, "four")[1]
    recover = {"tokens": arguments.tokens}
    sections = {**TARGETS[arguments.target], "recover": recover, "evaluation": {"generation": False}}
    recipe = write_recipe(folder / "recipe.yaml", {"id": SMOLLM2, "dtype": "float32"}, section, **sections)
    finish(run(recipe, folder / "run", *(part for text in arguments.overrides for part in ("--set", text))))
    return folder / "run"


def judge(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the row of a run: perplexities by text, excesses, and the figures of the training."""
    windows = judged_windows(arguments, AutoTokenizer.from_pretrained(folder / "model"))
    dense = load_model(ModelSource(id=SMOLLM2, dtype="float32"))
    found: dict[str, dict[str, float]] = {}
    for name, ids_NL in windows.items():
        before, after = (perplexity(folder / place, ids_NL, exact=True) for place in ("repaired", "model"))
        found[name] = {"dense": perplexity_of(dense, ids_NL, exact=True), "repaired": before, "trained": after}
    excess = {
        place: {name: round(math.log(each[place] / each["dense"]), 4) for name, each in found.items()}
        for place in ("repaired", "trained")
    }
    trained = report_of(folder)["recovery"]
    kept = ("tokens", "steps", "batch_tokens", "learning_rate", "best_step", "seconds", "setbacks")
    return {
        "target": arguments.target,
        "tokens": arguments.tokens,
        "settings": arguments.overrides,
        "judged": arguments.judged,
        "perplexity": {name: {place: round(value, 3) for place, value in each.items()} for name, each in found.items()},
        "excess": excess,
        "training": {name: trained[name] for name in kept},
        "checks": [
            {
                "tokens": check["tokens"],
                "divergence": {Path(name).name: round(value, 4) for name, value in check["divergence"].items()},
            }
            for check in trained["checks"]
        ],
    }


def main() -> None:
    """Prune, train and judge one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--tokens", default="500K", help="to train on")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="further text to judge on")
    parser.add_argument("--judged", type=int, default=8, help="windows of each text")
    parser.add_argument("--run", type=Path, help="folder of a finished run to judge")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = judge(arguments, arguments.run or prune_and_train(arguments, Path(folder)))
    recorded = RESULTS / "recovery.json"
    rows = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []
    key = ("target", "tokens", "settings")
    rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
    record("recovery", {"rows": rows})


if __name__ == "__main__":
    main()
