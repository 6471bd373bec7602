"""Cost of the two passes: time against a forward pass, memory, several processes against one, time to start.

    python eval/benchmarks/passes.py speed  [--tokens FILE.safetensors --key calibration] [--repeats 3]
    python eval/benchmarks/passes.py sparsity [--tokens FILE.safetensors --key calibration] [--repeats 3]
    python eval/benchmarks/passes.py memory [--billions 1 3 | --sparse --billions 0.25 0.5 | --mixture --billions 2.8]
    python eval/benchmarks/passes.py processes
    python eval/benchmarks/passes.py private [--billions 1]
    python eval/benchmarks/passes.py startup [--repeats 5]

Each measures ``llmprune run`` in processes of its own and writes its figures, with the machine they
came from, into eval/benchmarks/results/passes-WHAT.json. Run one at a time on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from anonymous_memory import of_bare_interpreter, peak_of, peaks_of_workers
from common import SMOLLM2, TOPICS, finish, record, report_of, run, write_recipe
from random_models import SavedModel, llama_1b, mixture, save_random
from safetensors.torch import load_file, save_file

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
_PER_LAYER = {llama_1b: 1.1e9 / 22, mixture: 2.85e9 / 32}  # parameters, with a layer's share of the embeddings
# Parts of the start, and the line of the run's progress at which each ends.
_ENDS = {"imports": "planning", "plan": "reading text", "texts": "pass 1", "model": "pass 1: scoring layers"}


def windows(arguments: argparse.Namespace) -> dict[str, Any]:
    """32 windows of 512 tokens, of the file that was given or of Python's manual."""
    tokens = {"tokens": arguments.tokens, "key": arguments.key} if arguments.tokens else TOPICS
    return {**tokens, "samples": 32, "sequence_length": 512, "self_generated": 0}


def measure_sparsity(folder: Path, arguments: argparse.Namespace) -> None:
    """Pass 2 alone making every matrix of the layers 2:4, as multiples of a plain forward pass, by method."""
    methods: dict[str, dict[str, Any]] = {
        "default": {},
        "wanda": {"method": {"kind": "wanda"}},
        "sparsegpt, not refit": {"method": {"kind": "sparsegpt", "refit": False}},
    }
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(arguments.repeats):
        for name, settings in methods.items():
            recipe = write_recipe(
                folder / "recipe.yaml",
                {"id": SMOLLM2, "dtype": "float32"},
                windows(arguments),
                sparsity={"pattern": "2:4"} | settings,
            )
            finish(run(recipe, folder / "run", "--fresh", "--measure-forward"))
            found = {step["name"]: step["forward_ratio"] for step in report_of(folder / "run")["steps"]}
            ratios[name].append(found["pass 2"])
    medians = {name: median(all_) for name, all_ in ratios.items()}
    record("passes-sparsity", {"tokens": 32 * 512, "ratios": ratios, "medians": medians})


def measure_speed(folder: Path, arguments: argparse.Namespace) -> None:
    """Both passes as multiples of a plain forward pass of the decoder over the same tokens, in the same run."""
    recipe = write_recipe(
        folder / "recipe.yaml",
        {"id": SMOLLM2, "dtype": "float32"},
        windows(arguments),
        depth={"remove": 6, "criterion": {"kind": "block_influence"}},  # which the passes score by themselves
        width={"mlp": 0.75},
    )
    ratios: dict[str, list[float]] = {"pass 1": [], "pass 2": [], "pruning": []}
    for _ in range(arguments.repeats):
        finish(run(recipe, folder / "run", "--fresh", "--measure-forward"))
        found = {step["name"]: step["forward_ratio"] for step in report_of(folder / "run")["steps"]}
        ratios["pass 1"].append(found["pass 1"])
        ratios["pass 2"].append(found["pass 2"])
        ratios["pruning"].append(found["pass 1"] + found["pass 2"])
    record(
        "passes-speed",
        {"tokens": 32 * 512, "ratios": ratios, "medians": {name: median(all_) for name, all_ in ratios.items()}},
    )


def measure_memory(folder: Path, arguments: argparse.Namespace) -> None:
    """Peak anonymous memory of a run at several depths of the same layers, or of a mixture of experts.

    The bare interpreter is part of each peak; ``above_bare`` leaves it out.
    """
    shape = mixture if arguments.mixture else llama_1b
    cuts = {"sparsity": {"pattern": "2:4"}} if arguments.sparse else {"width": {"mlp": 0.75}}
    samples = 24 if arguments.sparse else 4  # 2:4 needs a regular Gram matrix
    bare = of_bare_interpreter()
    figures = []
    for billions in arguments.billions:
        layers = round(billions * 1e9 / _PER_LAYER[shape])
        saved = save_random(shape(layers), folder / "model")
        recipe = random_recipe(
            folder, saved, samples=samples, batch_size=1, depth={"remove": max(layers // 5, 1)}, **cuts
        )
        process = run(recipe, folder / "run", "--fresh")
        peak = peak_of(process)
        finish(process)
        figures.append(
            {
                "layers": layers,
                "model_bytes": saved.bytes,
                "layer_bytes": saved.layer_bytes,
                "peak_anonymous": peak,
                "above_bare": peak - bare,
                "share": round(peak / saved.bytes, 4),
            }
        )
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "run")
    kind = "-mixture" if arguments.mixture else "-sparse" if arguments.sparse else ""
    record(f"passes-memory{kind}", {"bare_interpreter": bare, "runs": figures})


def random_recipe(folder: Path, saved: SavedModel, *, samples: int, dtype: str = "auto", **sections: Any) -> Path:
    """Write a recipe for a random model, calibrated on windows of 256 random tokens; it returns the recipe's path."""
    save_file({"calibration": torch.randint(0, 32000, (samples, 256))}, folder / "tokens.safetensors")
    calibration = {"tokens": str(folder / "tokens.safetensors"), "key": "calibration", "self_generated": 0}
    batch_size = sections.pop("batch_size", None)
    return write_recipe(
        folder / "recipe.yaml",
        {"id": str(saved.folder), "dtype": dtype},
        calibration | ({"batch_size": batch_size} if batch_size else {}),
        **sections,
    )


def measure_startup(folder: Path, arguments: argparse.Namespace) -> None:
    """Seconds from the start of ``llmprune run`` to its first layer, by part."""
    recipe = write_recipe(
        folder / "recipe.yaml", {"id": SMOLLM2, "dtype": "float32"}, windows(arguments), depth={"remove": 6}
    )
    parts: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        process = run(recipe, folder / "run", "--fresh")
        assert process.stderr is not None
        for line in process.stderr:
            ended = next((part for part, mark in _ENDS.items() if line[9:].split(",")[0].strip() == mark), None)
            if ended is not None:
                now = time.perf_counter()
                parts.setdefault(ended, []).append(round(now - began, 3))
                began = now
            if ended == "model":
                break
        process.kill()
        process.wait()
    totals = [round(sum(once), 3) for once in zip(*parts.values(), strict=True)]
    medians = {part: median(seconds) for part, seconds in parts.items()}
    record("passes-startup", {"seconds": totals, "median": median(totals), "parts": parts, "medians": medians})


def measure_private(folder: Path, arguments: argparse.Namespace) -> None:
    """Anonymous memory of each of two torchrun processes, above a bare interpreter, by the type of the computation."""
    bare = of_bare_interpreter()
    layers = round(arguments.billions[0] * 1e9 / _PER_LAYER[llama_1b])
    saved = save_random(llama_1b(layers), folder / "model")
    figures = []
    for dtype in ("auto", "float32"):
        cuts = {"depth": {"remove": max(layers // 5, 1)}, "width": {"mlp": 0.75}}
        recipe = random_recipe(folder, saved, samples=8, dtype=dtype, **cuts)
        process = run(recipe, folder / "run", "--fresh", launcher=TORCHRUN)
        peaks = peaks_of_workers(process)
        finish(process)
        figures.append(
            {
                "dtype": dtype,
                "layer_bytes": saved.layer_bytes * (2 if dtype == "float32" else 1),
                "peaks": peaks,
                "above_bare": [peak - bare for peak in peaks],
                "planned": json.loads((folder / "run" / "plan.json").read_text())["memory"],
            }
        )
    record(
        "passes-private-memory",
        {"bare_interpreter": bare, "model_bytes": saved.bytes, "layers": layers, "runs": figures},
    )


def measure_processes(folder: Path, _: argparse.Namespace) -> None:
    """Two torchrun processes against one: the same cut, and how far the weights are apart."""
    recipe = write_recipe(
        folder / "recipe.yaml",
        {"id": SMOLLM2, "dtype": "float32"},
        {**TOPICS, "samples": 16, "sequence_length": 256, "self_generated": 0},
        depth={"remove": 6},
        width={"mlp": 0.75},
    )
    finish(run(recipe, folder / "one"))
    finish(run(recipe, folder / "two", launcher=TORCHRUN))
    one, two = (load_file(folder / name / "model" / "model.safetensors") for name in ("one", "two"))
    cuts = [load_file(folder / name / "cut.safetensors") for name in ("one", "two")]
    record(
        "passes-processes",
        {
            "processes": report_of(folder / "two")["provenance"]["processes"],
            "same_layers": (folder / "one/cut.json").read_text() == (folder / "two/cut.json").read_text(),
            "same_neurons": all(torch.equal(cuts[0][key], cuts[1][key]) for key in cuts[0]),
            "largest_relative_difference": max(float((one[key] - two[key]).norm() / one[key].norm()) for key in one),
        },
    )


def main() -> None:
    """Measure one thing in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "sparsity", "memory", "processes", "private", "startup"])
    parser.add_argument("--tokens", help="safetensors file of token windows; default: Python's manual")
    parser.add_argument("--key", default="calibration")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--billions", type=float, nargs="+", default=[1, 3])
    parser.add_argument("--sparse", action="store_true", help="of memory: 2:4 sparsity in place of narrower MLPs")
    parser.add_argument("--mixture", action="store_true", help="of memory: a mixture of experts")
    arguments = parser.parse_args()
    measures = {
        "speed": measure_speed,
        "sparsity": measure_sparsity,
        "memory": measure_memory,
        "processes": measure_processes,
        "private": measure_private,
        "startup": measure_startup,
    }
    with tempfile.TemporaryDirectory() as folder:
        measures[arguments.what](Path(folder), arguments)


if __name__ == "__main__":
    main()
