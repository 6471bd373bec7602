"""Parts of the GPU benchmark. Each gets a folder of its own, the scale, the seconds left and the figures of 1 B."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from common import write_recipe
from device_time import time_shares
from random_models import SavedModel, llama_1b, llama_8b, llama_tiny, save_random
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from llmprune import Recipe, RecipeError, run
from llmprune.cli.bench import bench_models, bench_sparse
from llmprune.common.console import PlainConsole
from llmprune.evaluation.bench.speed_and_memory import BenchSettings
from llmprune.recipe.model import ModelSource

Figures = dict[str, Any]
_REPOSITORY = Path(__file__).parents[2]
_PASSES = ("pass 1", "pass 2")
_LARGEST_SHARE = 0.6  # of the device's memory, for the weights: the plain forward pass holds the whole model
_SLACK = 1.25  # of a predicted time


@dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark. ``most_windows``: of the large model, halved until the time left is enough."""

    small: Callable[..., LlamaConfig]
    large: Callable[..., LlamaConfig]
    layers: int  # of the large model
    profiled_layers: int
    fewer_layers: int  # of the small model, cut in depth
    fewer_neurons: int  # of the small model, cut in width by as many parameters
    length: int  # tokens of a window
    windows: int
    most_windows: int
    bench: BenchSettings


REAL = Scale(
    llama_1b,
    llama_8b,
    layers=32,
    profiled_layers=4,
    fewer_layers=17,
    fewer_neurons=4096,
    length=2048,
    windows=16,
    most_windows=128,
    bench=BenchSettings((1, 8), (64, 1024), new_tokens=32, repeats=3),
)
TINY = Scale(
    llama_tiny,
    llama_tiny,
    layers=4,
    profiled_layers=2,
    fewer_layers=3,
    fewer_neurons=96,
    length=32,
    windows=4,
    most_windows=8,
    bench=BenchSettings((1,), (8,), new_tokens=4, repeats=1),
)


@dataclass(frozen=True)
class Small:
    """Speed of the 1 B part: seconds of the steps that grow with tokens or with bytes, and of the start."""

    tokens: int
    bytes: int
    by_token: float
    by_byte: float
    start: float

    @classmethod
    def of(cls, figures: Figures) -> Small:
        """Read them from the part's figures. Verification starts a process of its own, as the part does."""
        steps = [(step["name"], step["seconds"], bool(step["tokens_per_second"])) for step in figures["steps"]]
        by_token = sum(seconds for _, seconds, has_tokens in steps if has_tokens)
        others = figures["save_seconds"] + sum(seconds for _, seconds, has_tokens in steps if not has_tokens)
        start = max(figures["seconds"] - by_token - others, 0)
        second_start = min(start, sum(seconds for name, seconds, _ in steps if name == "verification"))
        tokens = figures["windows"] * figures["length"]
        return cls(tokens, figures["bytes"], by_token, others - second_start, start + second_start)

    def predict(self, tokens: int, size: int) -> float:
        """Return the seconds that a model of ``size`` bytes would take for this many tokens."""
        growth = size / self.bytes
        return _SLACK * (self.start + self.by_byte * growth + self.by_token * growth * tokens / self.tokens)


def gpu_name() -> str:
    """Name of the first GPU, or of the CPU's kind; asked in another process, so that this one holds no GPU memory."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return "none"
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def run_tests(folder: Path, scale: Scale, seconds: float, small: Small | None) -> Figures:
    """Run the tests that need a GPU."""
    files = [path for path in (_REPOSITORY / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    report = folder / "tests.xml"
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *map(str, files)], cwd=_REPOSITORY)
    if not report.is_file():
        return {"failed": f"pytest ended with exit code {done.returncode} and without a report"}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [f"{case.get('name')}" for case in cases for kind in ("failure", "error") if case.find(kind) is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failures) - skipped, "skipped_tests": skipped, "failures": failures}


def run_small(folder: Path, scale: Scale, seconds: float, small: Small | None) -> Figures:
    """Run depth and width pruning of the small model with default settings."""
    return _run(folder, scale.small(), scale, windows=scale.windows)


def run_large(folder: Path, scale: Scale, seconds: float, small: Small | None) -> Figures:
    """Run the same on the large model: as many layers as memory and disk hold, as many windows as the time allows."""
    if small is None:
        return {"skipped": "its time cannot be predicted without the figures of 1 B"}
    config = scale.large(_fitting_layers(folder, scale))
    size = _bytes(config)
    windows = scale.most_windows
    while small.predict(windows * scale.length, size) > seconds:
        windows //= 2
        if windows < 4:
            needed = small.predict(4 * scale.length, size)
            return {"skipped": f"it would take about {needed:.0f} s, and {seconds:.0f} s are left"}
    return _run(folder, config, scale, windows=windows)


def run_profile(folder: Path, scale: Scale, seconds: float, small: Small | None) -> Figures:
    """Run both passes over a few layers of the large shape under torch.profiler."""
    saved = save_random(scale.large(scale.profiled_layers), folder / "model")
    recipe = _recipe(folder, saved, scale, windows=scale.windows)
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        report = run(recipe, folder / "run")
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    shares = {step: time_shares(events, step) for step in _PASSES}
    layers = {"pass 1": report.dense.layers, "pass 2": report.pruned.layers}
    for step, figures in shares.items():
        figures["waits_per_layer"] = round(figures["wait_calls"] / layers[step], 2)
    peaks = {step.name: step.peak_device for step in report.steps if step.name in _PASSES}
    return {
        "layers": scale.profiled_layers,
        "layer_bytes": saved.layer_bytes,
        "shares": shares,
        "peak_device": peaks,
    }


def run_decoding(folder: Path, scale: Scale, seconds: float, small: Small | None) -> Figures:
    """Time decoding of the dense small model against one with fewer layers and one with fewer MLP neurons."""
    base = save_random(scale.small(), folder / "dense").folder
    cuts = {
        "depth": save_random(scale.small(scale.fewer_layers), folder / "depth").folder,
        "width": save_random(scale.small(mlp=scale.fewer_neurons), folder / "width").folder,
    }
    decoding = {}
    for name, cut in cuts.items():
        output = folder / f"{name}.json"
        bench_models(
            ModelSource(id=str(cut)),
            ModelSource(id=str(base)),
            settings=scale.bench,
            output=output,
            console=PlainConsole(stderr=True),
        )
        decoding[name] = _points(json.loads(output.read_text()))
    return {"layers": scale.fewer_layers, "neurons": scale.fewer_neurons, "decoding": decoding}


def run_sparse(folder: Path, scale: Scale, seconds: float, small: Small | None) -> Figures:
    """Time the small model's matrices, 2:4, with dense and with sparse kernels."""
    source = ModelSource(id=str(save_random(scale.small(), folder / "sparse", sparse=True).folder))
    output = folder / "sparse.json"
    try:
        bench_sparse(source, settings=scale.bench, output=output, console=PlainConsole(stderr=True))
    except RecipeError as error:  # no GPU, or one without sparse tensor cores
        return {"skipped": str(error)}
    figures = json.loads(output.read_text())
    return {"products": figures["products"], "decoding": _points(figures)}


PARTS: dict[str, Callable[[Path, Scale, float, Small | None], Figures]] = {
    "tests": run_tests,
    "1 B": run_small,
    "profile": run_profile,
    "decoding": run_decoding,
    "2:4": run_sparse,
    "8 B": run_large,
}


def _run(folder: Path, config: LlamaConfig, scale: Scale, *, windows: int) -> Figures:
    """Prune a random model of this shape, and time plain forward passes in the same run."""
    began = time.perf_counter()
    saved = save_random(config, folder / "model")
    save_seconds = time.perf_counter() - began
    report = run(_recipe(folder, saved, scale, windows=windows), folder / "run", measure_forward=True)
    steps = [
        step.model_dump(include={"name", "seconds", "tokens_per_second", "forward_ratio", "peak_device"})
        for step in report.steps
    ]
    return {
        "parameters": report.dense.parameters,
        "bytes": saved.bytes,
        "layer_bytes": saved.layer_bytes,
        "layers": config.num_hidden_layers,
        "windows": windows,
        "length": scale.length,
        "save_seconds": round(save_seconds, 2),
        "forward_passes": round(sum(step.forward_ratio or 0 for step in report.steps if step.name in _PASSES), 3),
        "steps": steps,
        "device": report.provenance.device,
    }


def _recipe(folder: Path, saved: SavedModel, scale: Scale, *, windows: int) -> Recipe:
    """Remove a fifth of the layers and a quarter of the neurons, with default settings, by random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(saved.config.vocab_size, (windows, scale.length), generator=generator)
    save_file({"calibration": tokens}, folder / "tokens.safetensors")
    path = write_recipe(
        folder / "recipe.yaml",
        {"id": str(saved.folder)},
        {"tokens": str(folder / "tokens.safetensors"), "key": "calibration"},
        depth={"remove": max(saved.config.num_hidden_layers // 5, 1)},
        width={"mlp": 0.75},
    )
    return Recipe.load(path)


def _fitting_layers(folder: Path, scale: Scale) -> int:
    """Return how many layers of the large model fit the device's memory, and the disk together with the result."""
    one, two = _bytes(scale.large(1)), _bytes(scale.large(2))
    room: float = shutil.disk_usage(folder).free / 3
    if torch.cuda.is_available():
        room = min(room, _LARGEST_SHARE * torch.cuda.get_device_properties(0).total_memory)
    return max(1, min(scale.layers, int((room - one) // (two - one)) + 1))


def _bytes(config: LlamaConfig) -> int:
    """Return the bytes of a Llama's weights in bfloat16."""
    heads = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layer = config.hidden_size * (2 * config.hidden_size + 2 * heads + 3 * config.intermediate_size)
    size: int = 2 * (config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size)
    return size


def _points(figures: Figures) -> list[Figures]:
    """Return the decoding speed of each case of a bench, in new tokens per second, and its ratio."""
    return [
        {
            "batch_size": point["batch_size"],
            "context": point["context"],
            "dense": round(point["decode"]["base"]["median"], 2),
            "pruned": round(point["decode"]["model"]["median"], 2),
            "ratio": round(point["decode"]["ratio"]["median"], 3),
        }
        for point in figures["points"]
    ]
