"""Shape that a search chooses against other shapes of its size: KL divergence on text that neither saw.

    python eval/benchmarks/search.py DATA SIZE [--shapes 30x992x3 27x1184x3 …] [--text NAME=FILE …] [--run FOLDER]

SmolLM2-135M-Instruct is calibrated on four kinds of text in the folder DATA, 64 x 512 tokens, and searched with
``budget: {parameters: SIZE}`` in FOLDER, where a finished run is taken as it is. Then it is cut from the same scores to
other shapes: LAYERSxNEURONSxGROUPS, by default those that only remove layers, only neurons, half of each, and heads
too. Their layers are the first of the search's order. All are judged in exact float32 on WikiText's test text, GSM8K's
test questions with answers, Python's manual, and files of plain text by ``--text``, ``--judged`` windows of 512 tokens
each. Rows of results/search.json are replaced by size and shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import RESULTS, SMOLLM2, finish, record, report_of, run, write_recipe
from quality import mixed
from texts import given_documents, judging_documents, windows_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmprune.checkpoint.loading import load_model
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.search import SearchFigures, TriedShape

SEEN_KIND = "wikitext"  # a kind of text that is in the calibration, of which other windows are judged


@torch.no_grad()
def divergence(dense: PreTrainedModel, folder: Path, windows: dict[str, Tensor]) -> dict[str, float]:
    """Return KL(dense ‖ checkpoint) in nats per token, by text."""
    pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for name, ids_NL in windows.items():
        parts = []
        for ids_BL in torch.split(ids_NL, 1):
            logits = [model(input_ids=ids_BL, use_cache=False).logits[:, :-1] for model in (dense, pruned)]
            parts.append(kl_divergence(*logits).mean().item())
        found[name] = round(fmean(parts), 4)
    return found


def judged_windows(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Return windows of 512 tokens by the name of the text."""
    known = judging_documents(arguments.data)
    documents = {kind: known[kind] for kind in (SEEN_KIND, "gsm8k", "pydoc")}
    documents |= given_documents(arguments.text)
    tokenizer = AutoTokenizer.from_pretrained(arguments.run / "model")
    return {name: windows_of(texts, tokenizer, count=arguments.judged, length=512) for name, texts in documents.items()}


def shapes_of(found: SearchFigures, asked: list[str]) -> list[TriedShape]:
    """Return the shapes to compare with the chosen one: those asked for, or one-sided ones, half and half, heads."""
    tried = [one for one in found.tried if one.further is None]
    if asked:
        sizes = [tuple(map(int, text.split("x"))) for text in asked]
        return [one for one in tried if (one.layers, next(iter(one.widths.values())), one.kv_groups) in sizes]
    wanted = [
        min((one for one in tried if found.axes(one) == (axis,)), key=_score, default=None)
        for axis in ("layers", "mlp")
    ]
    mixed_ones = [one for one in tried if found.axes(one) == ("layers", "mlp")]
    wanted.append(min(mixed_ones, key=lambda one: abs(one.layers - _middle(mixed_ones)), default=None))
    wanted.append(min((one for one in tried if "heads" in found.axes(one)), key=_score, default=None))
    return [one for one in wanted if one is not None]


def _score(one: TriedShape) -> float:
    return one.scores[0]


def _middle(shapes: list[TriedShape]) -> float:
    return fmean(one.layers for one in shapes)


def search(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the recipe with the budget."""
    calibration, model = mixed(arguments.data, "four")[1], {"id": SMOLLM2, "dtype": "float32"}
    sections = {"budget": {"parameters": arguments.size}, "evaluation": {"generation": False}}
    finish(run(write_recipe(folder / "recipe.yaml", model, calibration, **sections), arguments.run))


def cut_to(one: TriedShape, run_folder: Path, folder: Path) -> Path:
    """Run the recipe again in another folder, with the scores of the search and with this shape as its choice."""
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("model", "cut.*", "pruning.json", "report.*"))
    found = json.loads((folder / "search.json").read_text())
    found["chosen"][0]["name"] = one.name
    (folder / "search.json").write_text(json.dumps(found))
    finish(run(folder / "recipe.yaml", folder))
    return folder


def row_of(
    arguments: argparse.Namespace, one: TriedShape, divergences: dict[str, float], *, chosen: str
) -> dict[str, Any]:
    """Return the row of a shape."""
    unseen = [value for name, value in divergences.items() if name != SEEN_KIND]
    return {
        "size": arguments.size,
        "shape": one.name,
        "chosen": one.name == chosen,
        "parameters": one.parameters,
        "removed": list(one.removed),
        "scores": [round(value, 4) for value in one.scores],
        "divergence": divergences,
        "unseen": round(fmean(unseen), 4),
    }


def main() -> None:
    """Search, prune the other shapes, and judge all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("size", type=float, help="fraction of the parameters")
    parser.add_argument("--shapes", nargs="*", default=[], metavar="LAYERSxNEURONSxGROUPS")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="further text to judge on")
    parser.add_argument("--judged", type=int, default=4, help="windows of each text")
    parser.add_argument("--run", type=Path, help="folder for the run of the search")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        arguments.run = arguments.run or Path(place) / "run"
        if not (arguments.run / "report.json").is_file():
            search(arguments, Path(place))
        found = SearchFigures.model_validate(report_of(arguments.run)["search"])
        windows, dense = judged_windows(arguments), load_model(ModelSource(id=SMOLLM2, dtype="float32")).eval()
        chosen = found.chosen_shape(0)
        rows = [row_of(arguments, chosen, divergence(dense, arguments.run / "model", windows), chosen=chosen.name)]
        for one in shapes_of(found, arguments.shapes):
            if one.name != chosen.name:
                cut = cut_to(one, arguments.run, Path(place) / "other")
                rows.append(row_of(arguments, one, divergence(dense, cut / "model", windows), chosen=chosen.name))
                shutil.rmtree(cut)
                keep(rows, found)


def keep(rows: list[dict[str, Any]], found: SearchFigures) -> None:
    """Record the rows, in place of earlier ones of the same size and shape, with the cost of the search."""
    recorded = RESULTS / "search.json"
    old = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []
    new = [(row["size"], row["shape"]) for row in rows]
    kept = [row for row in old if (row["size"], row["shape"]) not in new]
    search = {"size": rows[0]["size"], "forward_passes": found.forward_passes, "seconds": found.seconds}
    record("search", {"rows": kept + rows, "search": search})


if __name__ == "__main__":
    main()
