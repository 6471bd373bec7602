"""Perplexity of peers on the texts of ``quality.py``, to compare its rows with.

    python eval/benchmarks/peers.py BENCH DATA [TARGET …]

Needs ``pip install optipfair`` (0.4.2), whose own code prunes MLPs by weights and activations on the protocol's
calibration tokens. Layers are those that ShortGPT's block influence removes by BENCH/peers.json, taken out of the model
as it does. BENCH, DATA and the targets are as in ``quality.py``, and rows are replaced by target; all in exact float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SMOLLM2, record
from optipfair import prune_model
from quality import unseen
from safetensors.torch import load_file
from texts import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmprune.checkpoint.location import folder_of
from llmprune.recipe.model import ModelSource

LOST = {"mlp-25": 25, "mlp-50": 50}  # percent of the neurons


def without_layers(model: PreTrainedModel, gone: list[int]) -> PreTrainedModel:
    """The model without some of its layers."""
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(model.model.layers) if index not in gone
    )
    model.config.num_hidden_layers = len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    return model


def narrowed(model: PreTrainedModel, percent: int, windows_NL: torch.Tensor) -> PreTrainedModel:
    """The model after optipfair's data-driven pruning of its MLPs."""
    batches = [
        {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)} for ids_BL in torch.split(windows_NL, 4)
    ]
    return prune_model(model, pruning_percentage=percent, dataloader=batches, show_progress=False)


def main() -> None:
    """Prune with each and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("targets", nargs="*", help="default: all")
    arguments = parser.parse_args()
    folder = folder_of(ModelSource(id=SMOLLM2), "weights")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = load_file(arguments.bench / "tokens.safetensors")
    texts = {"wikitext": tokens["evaluation"].long()}
    texts |= unseen(arguments.data, AutoTokenizer.from_pretrained(folder))
    peers = json.loads((arguments.bench / "peers.json").read_text())["rows"]
    gone = {row["target"]: row["removed"] for row in peers if row["tool"] == "ShortGPT"}
    recorded = RESULTS / "peers.json"
    rows: list[dict[str, Any]] = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []

    def narrow(model: PreTrainedModel, percent: int) -> PreTrainedModel:
        return narrowed(model, percent, tokens["calibration"].long())

    prunings: dict[str, tuple[str, Callable[[PreTrainedModel], PreTrainedModel]]] = {
        "dense": ("dense", lambda model: model),
        **{target: ("ShortGPT", partial(without_layers, gone=layers)) for target, layers in gone.items()},
        **{target: ("optipfair", partial(narrow, percent=percent)) for target, percent in LOST.items()},
        "depth-3 and mlp-25": (
            "ShortGPT, then optipfair",
            lambda model: narrow(without_layers(model, gone["depth-3"]), LOST["mlp-25"]),
        ),
    }
    unknown = set(arguments.targets) - prunings.keys()
    if unknown:
        parser.error(f"unknown targets {sorted(unknown)}; there are {', '.join(prunings)}")
    for target in arguments.targets or prunings:
        tool, prune = prunings[target]
        with tempfile.TemporaryDirectory() as place:
            prune(copy.deepcopy(dense)).save_pretrained(place)
            found = {name: round(perplexity(Path(place), ids_NL, exact=True), 3) for name, ids_NL in texts.items()}
        rows = [row for row in rows if row["target"] != target] + [{"tool": tool, "target": target, **found}]
        record("peers", {"rows": rows})


if __name__ == "__main__":
    main()
