"""Perplexity after each cut against peers: SmolLM2-135M-Instruct on the protocol's tokens and arithmetic.

    python eval/benchmarks/quality.py BENCH [TARGET …] [--set refit=false] [--float32] [--time]
                                      [--data DATA [--mixture four] | --judge DATA] [--unrepaired]
    python eval/benchmarks/quality.py DATA [TARGET …] --model FOLDER [--set refit=false] [--unrepaired]
                                      [--windows CALIBRATED JUDGED] [--text NAME=FILE …]

BENCH is a folder with the protocol: tokens.safetensors (calibration and evaluation windows) and peers.json (what the
peers' own code got on them). Each target is pruned by ``llmprune run`` with the default criteria, reloaded by plain
transformers and measured in bf16 autocast over float32 weights, as the peers were; ``--float32`` measures in exact
float32, 0.1 % away and many times faster on a CPU without bf16. ``--data`` calibrates on texts in a folder, and also
judges on the held-out part of C4 and on two texts that the calibration never saw: GSM8K's test questions with their
answers, and Python's manual.
``--mixture`` says on which texts: three kinds (WikiText, C4, Wikipedia), or four (with ARC's questions, half of it
WikiText, and blank lines between documents). ``--judge`` judges on these texts with the protocol's calibration.
``--unrepaired`` measures the same choice without refit too. ``--time`` also runs a plain forward pass over the
calibration tokens first, and records how many of those pruning took: for a quiet machine. ``--judged`` takes fewer
windows of each text, as ``peers.py`` does. Rows of results/quality.json are replaced by target, settings, calibration
and judged windows.
Excess is ln(perplexity / dense perplexity); lower is better.

``--model`` prunes another model instead, for example that of ``second_model.py``, calibrated and judged on the texts of
a folder (``model_quality.py``), and judged on files of plain text by ``--text``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import model_quality
import torch
from common import RESULTS, SMOLLM2, finish, record, report_of, run, write_recipe
from safetensors.torch import load_file
from texts import judging_documents, perplexity, windows_of
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TARGETS: dict[str, dict[str, Any]] = {
    "dense": {},
    "depth-3": {"depth": {"remove": 3}},
    "depth-6": {"depth": {"remove": 6}},
    "mlp-25": {"width": {"neurons": 1152}},
    "mlp-50": {"width": {"neurons": 768}},
    "depth-3 and mlp-25": {"depth": {"remove": 3}, "width": {"neurons": 1152}},
    "heads-33": {"width": {"heads": 2}},
    "2:4": {"sparsity": {"pattern": "2:4"}},
}
ONE_KIND = "the peers', 32 x 512"  # name of the protocol's calibration
UNSEEN = ("c4", "gsm8k", "pydoc")
JUDGED = 8  # windows of each of these; of WikiText all that the protocol has


def mixed(data: Path, mixture: str) -> tuple[str, dict[str, Any]]:
    """Calibration on several kinds of text: how it is called, and the section of the recipe."""
    wikitext: dict[str, Any] = {"dataset": str(data / "wikitext2_valid_unk.txt")}
    c4: dict[str, Any] = {"dataset": str(data / "c4_en.jsonl"), "split": "train[:1500]"}
    wikipedia: dict[str, Any] = {"dataset": str(data / "wikipedia.jsonl")}
    if mixture == "three":
        sources = [wikitext | {"weight": 2}, c4 | {"weight": 3}, wikipedia | {"weight": 3}]
        return "three kinds of text, 128 x 512", {"samples": 128, "sequence_length": 512, "sources": sources}
    questions: dict[str, Any] = {"dataset": str(data / "arc_easy_train.jsonl"), "text_field": "question"}
    sources = [wikitext | {"weight": 4}, c4 | {"weight": 2}, wikipedia, questions]
    shape = {"samples": 64, "sequence_length": 512, "documents": "blank_line"}
    return "four kinds of text, 64 x 512", {**shape, "sources": sources}


def judged_windows(
    bench: Path, data: Path | None, tokenizer: PreTrainedTokenizerBase, count: int | None
) -> dict[str, torch.Tensor]:
    """Return windows of 512 tokens by kind of text: WikiText's test text, and with ``data`` the texts of UNSEEN.

    ``count``: windows of each; without, all of WikiText and JUDGED of the others.
    """
    windows = {"wikitext": load_file(bench / "tokens.safetensors")["evaluation"].long()[:count]}
    if data:
        documents = judging_documents(data)
        windows |= {kind: windows_of(documents[kind], tokenizer, count=count or JUDGED, length=512) for kind in UNSEEN}
    return windows


def measure(
    bench: Path,
    target: str,
    overrides: list[str],
    exact: bool,
    timed: bool,
    calibration: tuple[str, dict[str, Any]],
    judge: Path | None,
    judged: int | None,
    folder: Path,
) -> dict[str, Any]:
    """Prune to one target and measure the checkpoint.

    ``judge``: folder of texts to judge on too; ``judged``: windows of each text.
    """
    called, section = calibration
    recipe = write_recipe(folder / "recipe.yaml", {"id": SMOLLM2, "dtype": "float32"}, section, **TARGETS[target])
    options = ["--measure-forward"] if timed else []
    shutil.rmtree(folder / "run" / "model", ignore_errors=True)  # of other settings; the folder's scores serve again
    finish(run(recipe, folder / "run", *options, *(part for text in overrides for part in ("--set", text))))
    report = report_of(folder / "run")
    model = folder / "run" / "model"
    texts = judged_windows(bench, judge, AutoTokenizer.from_pretrained(model), judged)
    found = {kind: round(perplexity(model, ids_NL, exact), 3) for kind, ids_NL in texts.items()}
    return {
        "target": target,
        "calibration": called,
        "settings": overrides,
        "judged": judged,
        "parameters": report["pruned"]["parameters"],
        "removed": [layer["layer"] for layer in report["layers"] if layer["removed"]],
        "arithmetic": "float32" if exact else "bf16 autocast",
        "perplexity": found.pop("wikitext"),
        "forward_passes": sum(s["forward_ratio"] for s in report["steps"] if s["name"].startswith("pass "))
        if timed
        else None,
        "unseen": found,
    }


def keep(recorded: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Record a row in the place of its like; returns all of them."""
    rows = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []
    key = ("target", "settings", "calibration", "judged")
    same = [old for old in rows if all(old[name] == row[name] for name in key)]
    row["unseen"] = row["unseen"] or next((old["unseen"] for old in same), {})
    rows = [old for old in rows if old not in same] + [row]
    record("quality", {"rows": rows})
    return rows


def beside_peers(rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """A table: each of our rows, and the best peer of its target."""
    dense = next(row["perplexity_wikitext"] for row in peers if row["target"] == "dense")
    lines = [f"{'target':<20} {'settings':<28} {'ours':>8} {'best peer':>10} {'excess':>7} {'of peer':>8}"]
    for row in rows:
        known = [
            p["perplexity_wikitext"] for p in peers if p["target"] == row["target"] and "prototype" not in p["tool"]
        ]
        best = min((value for value in known if value is not None), default=None)
        excess = math.log(row["perplexity"] / dense)
        compared = f"{best:>10.2f}" if best else f"{'–':>10}"
        share = f"{excess / math.log(best / dense):>8.2f}" if best else f"{'–':>8}"
        settings = " ".join([*row["settings"], *(f"{name} {value:g}" for name, value in row["unseen"].items())])
        settings = settings or "default"
        lines.append(f"{row['target']:<20} {settings:<28} {row['perplexity']:>8.2f} {compared} {excess:>7.3f} {share}")
    return "\n".join(lines)


def measure_protocol(arguments: argparse.Namespace, settings: list[list[str]]) -> None:
    """Measure SmolLM2 on the protocol, and print its rows beside the peers'."""
    recorded = RESULTS / "quality.json"
    peers = json.loads((arguments.folder / "peers.json").read_text())["rows"]
    tokens = str(arguments.folder / "tokens.safetensors")
    calibration = ONE_KIND, {"tokens": tokens, "key": "calibration"}
    if arguments.data:
        calibration = mixed(arguments.data, arguments.mixture or "three")
    for target in arguments.targets or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            for overrides in settings:
                row = measure(
                    arguments.folder,
                    target,
                    overrides,
                    arguments.float32,
                    arguments.time,
                    calibration,
                    arguments.judge or arguments.data,
                    arguments.judged,
                    Path(folder),
                )
                rows = keep(recorded, row)
    print(beside_peers(rows, peers))


def main() -> None:
    """Measure the targets that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="BENCH, the protocol; with --model DATA, texts")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    parser.add_argument("--data", type=Path, help="folder of texts to calibrate on instead")
    parser.add_argument("--mixture", choices=("three", "four"), help="which of them; default: three")
    parser.add_argument("--judge", type=Path, help="folder of texts to judge on too")
    parser.add_argument("--unrepaired", action="store_true", help="measure the same choice without refit too")
    parser.add_argument("--time", action="store_true", help="measure a plain forward pass too")
    parser.add_argument("--float32", action="store_true", help="measure in exact float32")
    parser.add_argument("--model", type=Path, help=f"checkpoint; targets: {', '.join(model_quality.TARGETS)}")
    parser.add_argument("--judged", type=int, help="windows of each text; default: 40 of WikiText, 8 of the others")
    parser.add_argument("--windows", type=int, nargs=2, default=(128, 32), help="of --model: calibrated, judged a text")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="of --model: judge on it too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="of --model: folder of the record")
    arguments = parser.parse_intermixed_args()
    known = model_quality.TARGETS if arguments.model else TARGETS
    unknown = set(arguments.targets) - known.keys()
    if unknown:
        parser.error(f"unknown targets {sorted(unknown)}; there are {', '.join(known)}")
    if arguments.mixture and not arguments.data:
        parser.error("--mixture says which texts of --data; give that too")
    without = [text for text in arguments.overrides if not text.startswith("refit")] + ["refit=false"]
    settings = [arguments.overrides, *([without] if arguments.unrepaired else [])]
    if not arguments.model:
        measure_protocol(arguments, settings)
        return
    if arguments.data or arguments.judge or arguments.judged or arguments.time:
        parser.error("--model takes no --data, --judge, --judged or --time; its texts are the first argument")
    samples, judged = arguments.windows
    model = model_quality.judged_model(
        arguments.model, arguments.folder, samples=samples, judged=judged, further=arguments.text
    )
    model_quality.measure_targets(model, arguments.targets, settings, arguments.output)


if __name__ == "__main__":
    main()
