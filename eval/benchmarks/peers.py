"""Excess of pruning methods of others on texts left out of their calibration, to compare rows of ``quality.py`` with.

    python eval/benchmarks/peers.py BENCH --data DATA [TARGET …] [--tool NAME …] [--calibration four] [--judged 8]
    python eval/benchmarks/peers.py DATA [TARGET …] --model FOLDER [--tool NAME …] [--judged 32]

``peer_methods`` has the methods. The first form prunes SmolLM2-135M-Instruct on the protocol's calibration tokens and
on the four kinds of text of ``quality.py --mixture four``. It judges on WikiText's test text, the held-out part of C4,
GSM8K and Python's manual. The second form prunes any checkpoint shaped like Llama or Gemma 3, calibrated and judged as
by ``quality.py --model``. Where layers and neurons go, a depth method comes first and a width method prunes what it
leaves, with statistics of its own.

Rows of results/peers.json are told apart by model, tool, target, calibration and judged windows. Those that are there
are not measured again, unless the dense model changed; an interrupted run continues. A row says whether plain
transformers loads the checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SMOLLM2, write_record
from model_quality import described, judged_texts
from peer_methods import PEERS
from peer_methods.base import Peer, observe
from quality import ONE_KIND, judged_windows, mixed
from safetensors.torch import load_file
from texts import perplexity_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmprune.checkpoint.location import folder_of
from llmprune.data.windows import load_windows
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.model import ModelSource

# Layers, and share of the neurons of each MLP, that go.
TARGETS: dict[str, tuple[int, float]] = {
    "mlp-25": (0, 0.25),
    "depth-3": (3, 0),
    "mlp-50": (0, 0.5),
    "depth-6": (6, 0),
    "depth-3 and mlp-25": (3, 0.25),
}
MODEL_TARGETS: dict[str, tuple[int, float]] = {
    "mlp-25": (0, 0.25),
    "mlp-50": (0, 0.5),
    "depth-1": (1, 0),
    "depth-1 and mlp-25": (1, 0.25),
}
WIDTH = tuple(name for name, peer in PEERS.items() if peer.removes == "neurons")
PAIRS = [("ShortGPT", name) for name in WIDTH] + [("ReplaceMe", "OSSCAR")]  # depth methods and the width methods after
KEY = ("model", "tool", "target", "calibration", "judged")
Row = dict[str, Any]


@dataclass
class Bench:
    """A dense model, the texts that judge, calibrations by name, and the rows so far."""

    name: str
    dense: PreTrainedModel
    judged: dict[str, Tensor]
    calibrations: dict[str, Tensor]
    targets: dict[str, tuple[int, float]]
    windows: int  # of each text
    exact: bool
    results: Path
    rows: list[Row] = field(default_factory=list)

    def key(self, tool: str, target: str, calibration: str | None) -> dict[str, Any]:
        """Return what tells a row apart."""
        return dict(zip(KEY, (self.name, tool, target, calibration, self.windows), strict=True))

    def lacks(self, tool: str, target: str, calibration: str | None) -> bool:
        """Whether a row is still to be measured."""
        key = self.key(tool, target, calibration)
        return not any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def perplexity(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the perplexity on each text."""
        return {kind: round(perplexity_of(model, ids_NL, self.exact), 3) for kind, ids_NL in self.judged.items()}

    def measure_dense(self) -> None:
        """Measure the dense model, and drop rows of another one under its name."""
        key, found = self.key("dense", "dense", None), self.perplexity(self.dense)
        recorded = [row["perplexity"] for row in self.rows if all(row[name] == key[name] for name in key)]
        if not any(_alike(found, one) for one in recorded):
            self.rows = [row for row in self.rows if any(row[name] != key[name] for name in ("model", "judged"))]
            self.measure(self.dense, (), key)

    def measure(self, model: PreTrainedModel, removed: Sequence[int], key: Row) -> None:
        """Measure a model and record its row."""
        with tempfile.TemporaryDirectory() as folder:
            plain = loads_plain(model, Path(folder))
        row = key | {
            "arithmetic": "float32" if self.exact else "bf16 autocast",
            "parameters": model.num_parameters(),
            "loads_plain": plain,
            "removed": list(removed),
            "perplexity": self.perplexity(model),
        }
        self.rows.append(row)
        write_record("peers", {"rows": self.rows}, self.results)
        sys.stderr.write(f"{key['target']}, {key['tool']}, {key['calibration']}: {row['perplexity']}\n")

    def amounts(self, target: str) -> tuple[int, int]:
        """Return the number of layers and of neurons of each MLP that a target removes."""
        layers, share = self.targets[target]
        return layers, round(share * self.dense.config.intermediate_size)


def _alike(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two perplexities are of the same model: machines and arithmetic differ by less than 1 %."""
    return all(math.isclose(one[kind], other[kind], rel_tol=0.01) for kind in one)


def loads_plain(model: PreTrainedModel, folder: Path) -> bool:
    """Save a model, and say whether plain transformers loads exactly its weights."""
    model.save_pretrained(folder)
    _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    return not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def measure_single(bench: Bench, calibration: str, targets: Sequence[str], tools: Sequence[str]) -> None:
    """Measure the targets that one method reaches; methods share one forward pass for their statistics."""
    wanted: dict[str, dict[str, int]] = {}  # method -> target -> amount
    for target in targets:
        layers, neurons = bench.amounts(target)
        if not (layers and neurons):
            removes = "layers" if layers else "neurons"
            for tool in tools:
                if PEERS[tool].removes == removes and bench.lacks(tool, target, calibration):
                    wanted.setdefault(tool, {})[target] = layers or neurons
    peers = {tool: PEERS[tool](list(amounts.values())) for tool, amounts in wanted.items()}
    windows_NL = bench.calibrations[calibration]
    observe(bench.dense, list(peers.values()), windows_NL)
    for tool, target in ((tool, target) for target in targets for tool in tools if target in wanted.get(tool, ())):
        model = copy.deepcopy(bench.dense)
        removed = peers[tool].prune(model, wanted[tool][target], windows_NL)
        bench.measure(model, removed, bench.key(tool, target, calibration))


def measure_pairs(bench: Bench, calibration: str, target: str, tools: Sequence[str]) -> None:
    """Measure a target that takes layers and neurons: width methods share a forward pass behind each depth method."""
    layers, neurons = bench.amounts(target)
    windows_NL = bench.calibrations[calibration]
    for depth, widths in _missing_pairs(bench, calibration, target, tools):
        shallow = copy.deepcopy(bench.dense)
        removed = _peer_on(shallow, depth, layers, windows_NL).prune(shallow, layers, windows_NL)
        peers = [PEERS[width]([neurons]) for width in widths]
        observe(shallow, peers, windows_NL)
        for width, peer in zip(widths, peers, strict=True):
            model = copy.deepcopy(shallow)
            peer.prune(model, neurons, windows_NL)
            bench.measure(model, removed, bench.key(f"{depth}, then {width}", target, calibration))


def _missing_pairs(
    bench: Bench, calibration: str, target: str, tools: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield depth methods and the width methods that are still to be measured after each."""
    for depth in dict.fromkeys(depth for depth, _ in PAIRS if depth in tools):
        pairs = [(first, width) for first, width in PAIRS if first == depth and width in tools]
        widths = [width for _, width in pairs if bench.lacks(f"{depth}, then {width}", target, calibration)]
        if widths:
            yield depth, widths


def _peer_on(model: PreTrainedModel, tool: str, amount: int, windows_NL: Tensor) -> Peer:
    """Return a method that has seen a model."""
    peer = PEERS[tool]([amount])
    observe(model, [peer], windows_NL)
    return peer


def protocol_bench(arguments: argparse.Namespace) -> Bench:
    """Return SmolLM2 on the protocol."""
    folder = folder_of(ModelSource(id=SMOLLM2), "weights")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = load_file(arguments.folder / "tokens.safetensors")
    calibrations = {ONE_KIND: lambda: tokens["calibration"].long()}
    name, section = mixed(arguments.data, "four")
    calibrations[name] = lambda: _windows(section, tokenizer)
    chosen = {"one": [ONE_KIND], "four": [name], "both": [name, ONE_KIND]}[arguments.calibration]
    return Bench(
        "SmolLM2-135M-Instruct",
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        judged_windows(arguments.folder, arguments.data, tokenizer, arguments.judged),
        {name: calibrations[name]() for name in chosen},
        TARGETS,
        arguments.judged,
        arguments.float32,
        arguments.output,
    )


def model_bench(arguments: argparse.Namespace) -> Bench:
    """Return another model, calibrated and judged as by ``quality.py --model``."""
    judged, section = judged_texts(
        arguments.model, arguments.folder, samples=arguments.samples, judged=arguments.judged
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    return Bench(
        arguments.model.resolve().name,
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval(),
        judged,
        {described(section): _windows(section, tokenizer)},
        MODEL_TARGETS,
        arguments.judged,
        True,
        arguments.output,
    )


def _windows(section: dict[str, Any], tokenizer: Any) -> Tensor:
    calibration = Calibration.model_validate(section | {"self_generated": 0})
    return load_windows(calibration, tokenizer, default_shape=calibration.shape()).windows_NL


def main() -> None:
    """Prune with each and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="BENCH, the protocol; with --model DATA, texts")
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--data", type=Path, help="folder of texts to calibrate and judge on")
    parser.add_argument("--model", type=Path, help=f"checkpoint; targets: {', '.join(MODEL_TARGETS)}")
    parser.add_argument("--tool", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--calibration", choices=("one", "four", "both"), default="both", help="kinds of text")
    parser.add_argument("--judged", type=int, default=8, help="windows of each text; default: 8")
    parser.add_argument("--samples", type=int, default=128, help="of --model: calibration windows; default: 128")
    parser.add_argument("--float32", action="store_true", help="judge in exact float32, as --model always does")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_intermixed_args()
    if not (arguments.model or arguments.data):
        parser.error("the protocol needs --data, a folder of texts")
    bench = model_bench(arguments) if arguments.model else protocol_bench(arguments)
    unknown = set(arguments.targets) - bench.targets.keys()
    if unknown:
        parser.error(f"unknown targets {sorted(unknown)}; there are {', '.join(bench.targets)}")
    recorded = bench.results / "peers.json"
    bench.rows = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []
    bench.measure_dense()
    targets = arguments.targets or list(bench.targets)
    for calibration in bench.calibrations:
        measure_single(bench, calibration, targets, arguments.tool)
        for target in targets:
            if all(bench.amounts(target)):
                measure_pairs(bench, calibration, target, arguments.tool)


if __name__ == "__main__":
    main()
