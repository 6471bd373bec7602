"""What each cut keeps, beside the peers: SmolLM2-135M-Instruct on the protocol's own tokens and arithmetic.

    python eval/benchmarks/quality.py BENCH [TARGET …] [--set refit=false] [--float32]

BENCH is a folder with the protocol: tokens.safetensors (calibration and evaluation windows) and peers.json (what the
peers' own code got on them). Each target is pruned by ``llmprune run`` with the default criteria, reloaded by plain
transformers and measured in bf16 autocast over float32 weights, as the peers were; ``--float32`` measures in exact
float32, 0.1 % away and many times faster on a CPU without bf16. Rows of results/quality.json are
replaced by target and settings. Excess is ln(perplexity / dense perplexity); lower is better.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SMOLLM2, finish, record, report_of, run, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TARGETS: dict[str, dict[str, Any]] = {
    "depth-3": {"depth": {"remove": 3}},
    "depth-6": {"depth": {"remove": 6}},
    "mlp-25": {"width": {"neurons": 1152}},
    "mlp-50": {"width": {"neurons": 768}},
    "depth-3 and mlp-25": {"depth": {"remove": 3}, "width": {"neurons": 1152}},
}


@torch.inference_mode()
def perplexity(folder: Path, windows_NL: torch.Tensor, exact: bool) -> float:
    """exp of the mean next-token cross entropy, two windows at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = count = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
        for ids_BL in windows_NL.split(2):
            logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
            wanted = ids_BL[:, 1:]
            total += torch.nn.functional.cross_entropy(
                logits_BLV.flatten(0, 1), wanted.flatten(), reduction="sum"
            ).item()
            count += wanted.numel()
    return math.exp(total / count)


def measure(bench: Path, target: str, overrides: list[str], exact: bool, folder: Path) -> dict[str, Any]:
    """Prune to one target and measure the checkpoint."""
    tokens = {"tokens": str(bench / "tokens.safetensors"), "key": "calibration"}
    recipe = write_recipe(folder / "recipe.yaml", {"id": SMOLLM2, "dtype": "float32"}, tokens, **TARGETS[target])
    finish(run(recipe, folder / "run", "--fresh", *(part for text in overrides for part in ("--set", text))))
    report = report_of(folder / "run")
    windows_NL = load_file(bench / "tokens.safetensors")["evaluation"].long()
    return {
        "target": target,
        "settings": overrides,
        "parameters": report["pruned"]["parameters"],
        "removed": [layer["layer"] for layer in report["layers"] if layer["removed"]],
        "arithmetic": "float32" if exact else "bf16 autocast",
        "perplexity": round(perplexity(folder / "run" / "model", windows_NL, exact), 3),
        "seconds": {step["name"]: step["seconds"] for step in report["steps"]},
    }


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
        settings = " ".join(row["settings"]) or "default"
        lines.append(f"{row['target']:<20} {settings:<28} {row['perplexity']:>8.2f} {compared} {excess:>7.3f} {share}")
    return "\n".join(lines)


def main() -> None:
    """Measure the targets that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    parser.add_argument("--float32", action="store_true", help="measure in exact float32")
    arguments = parser.parse_intermixed_args()
    unknown = set(arguments.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"unknown targets {sorted(unknown)}; there are {', '.join(TARGETS)}")
    recorded = RESULTS / "quality.json"
    rows = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []
    peers = json.loads((arguments.bench / "peers.json").read_text())["rows"]
    for target in arguments.targets or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(arguments.bench, target, arguments.overrides, arguments.float32, Path(folder))
        same = [old for old in rows if (old["target"], old["settings"]) == (target, arguments.overrides)]
        rows = [old for old in rows if old not in same] + [row]
        record("quality", {"rows": rows})
    print(beside_peers(rows, peers))


if __name__ == "__main__":
    main()
