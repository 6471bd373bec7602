"""Cost of the two passes: time against a forward pass, memory against depth, several processes against one.

    python eval/benchmarks/passes.py speed  [--tokens FILE.safetensors --key calibration] [--repeats 3]
    python eval/benchmarks/passes.py sparsity [--tokens FILE.safetensors --key calibration] [--repeats 3]
    python eval/benchmarks/passes.py memory [--billions 1 3 | --sparse --billions 0.25 0.5]
    python eval/benchmarks/passes.py processes

Each measures ``llmprune run`` in processes of its own and writes its figures, with the machine they
came from, into eval/benchmarks/results/passes-WHAT.json. Run one at a time on a quiet machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import SMOLLM2, TOPICS, finish, record, report_of, run, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig


def windows(arguments: argparse.Namespace) -> dict[str, Any]:
    """32 windows of 512 tokens, of the file that was given or of Python's manual."""
    tokens = {"tokens": arguments.tokens, "key": arguments.key} if arguments.tokens else TOPICS
    return {**tokens, "samples": 32, "sequence_length": 512}


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
        depth={"remove": 6},
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


def make_llama(folder: Path, layers: int) -> tuple[int, int]:
    """A Llama with random weights in bf16 and TinyLlama-1.1B's layers; returns its bytes, and those of a layer."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    tile = torch.randn(1_000_003) * 0.02
    for parameter in model.parameters():
        copies = -(-parameter.numel() // len(tile))
        parameter.data = tile.repeat(copies)[: parameter.numel()].view(parameter.shape).to(torch.bfloat16)
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.save_pretrained(folder, max_shard_size="1GB")
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    return sum(parameter.nbytes for parameter in model.parameters()), layer


def peak_anonymous(process: subprocess.Popen[str]) -> int:
    """Most anonymous resident bytes of a process until it ends; the page cache does not count."""
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.02)
    return peak


def measure_memory(folder: Path, arguments: argparse.Namespace) -> None:
    """Peak anonymous memory of a run with every layer offloaded to disk, at several depths of the same layers."""
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    cuts = {"sparsity": {"pattern": "2:4"}} if arguments.sparse else {"width": {"mlp": 0.75}}
    samples = 24 if arguments.sparse else 4  # 2:4 needs a regular Gram matrix
    figures = []
    for billions in arguments.billions:
        layers = round(billions * 22 / 1.1)
        size, layer = make_llama(folder / "model", layers)
        save_file({"calibration": torch.randint(0, 32000, (samples, 256))}, folder / "tokens.safetensors")
        recipe = write_recipe(
            folder / "recipe.yaml",
            {"id": str(folder / "model"), "device_map": places},
            {"tokens": str(folder / "tokens.safetensors"), "key": "calibration", "batch_size": 1},
            depth={"remove": layers // 5},
            **cuts,
        )
        process = run(recipe, folder / "run", "--fresh")
        peak = peak_anonymous(process)
        finish(process)
        share = round(peak / size, 4)
        figures.append(
            {"layers": layers, "model_bytes": size, "layer_bytes": layer, "peak_anonymous": peak, "share": share}
        )
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "run")
    record("passes-memory-sparse" if arguments.sparse else "passes-memory", {"runs": figures})


def measure_processes(folder: Path, _: argparse.Namespace) -> None:
    """Two torchrun processes against one: the same cut, and how far the weights are apart."""
    recipe = write_recipe(
        folder / "recipe.yaml",
        {"id": SMOLLM2, "dtype": "float32"},
        {**TOPICS, "samples": 16, "sequence_length": 256},
        depth={"remove": 6},
        width={"mlp": 0.75},
    )
    finish(run(recipe, folder / "one"))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    finish(run(recipe, folder / "two", launcher=torchrun))
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
    parser.add_argument("what", choices=["speed", "sparsity", "memory", "processes"])
    parser.add_argument("--tokens", help="safetensors file of token windows; default: Python's manual")
    parser.add_argument("--key", default="calibration")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--billions", type=float, nargs="+", default=[1, 3])
    parser.add_argument("--sparse", action="store_true", help="of memory: 2:4 sparsity in place of narrower MLPs")
    arguments = parser.parse_args()
    measures = {
        "speed": measure_speed,
        "sparsity": measure_sparsity,
        "memory": measure_memory,
        "processes": measure_processes,
    }
    with tempfile.TemporaryDirectory() as folder:
        measures[arguments.what](Path(folder), arguments)


if __name__ == "__main__":
    main()
