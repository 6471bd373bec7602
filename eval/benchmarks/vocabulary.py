"""A budget met by MLP neurons alone against one that fewer tokens meet in part, on text that neither saw.

    python eval/benchmarks/vocabulary.py DATA SIZE [--vocabulary SETTINGS …] [--text NAME=FILE …]

SmolLM2-135M-Instruct is calibrated on texts in the folder DATA (WikiText, C4, Wikipedia and ARC's training questions)
and pruned to the shape of ``budget: {parameters: SIZE, axes: [mlp]}``, which has one: with all tokens, and for each
SETTINGS, such as ``{coverage: 0.99}``, with the vocabulary kept for these texts and GSM8K's training answers. Each is
measured as it is cut and, unless ``--unrepaired``, repaired. Judged are files of plain text by ``--text``, the first
``--characters`` of each in parts of 1,000, in exact float32:

- ``divergence``: KL(dense ‖ pruned) in nats per token, over the tokens that the pruned model kept and in its own
  segmentation, which the dense model reads too;
- ``bits_per_byte``: of both models, each in its own tokens, which is what a user of other text pays;
- ``lost``: share of the dense model's tokens of the text that are no longer one token; ``longer``: tokens / before.

Rows of results/vocabulary.json are replaced by size, settings and repair.

Shapes: L tokens of a part, K tokens kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, SMOLLM2, finish, record, report_of, run
from quality import mixed
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.checkpoint.loading import load_config, load_model, load_tokenizer
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.cut.decision import Cut
from llmprune.planning.base import describe_base
from llmprune.planning.budget.candidates import candidates
from llmprune.planning.budget.space import search_space
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe

_PART = 1000  # characters that are read together


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer. ``keep_K``: ids of its tokens in the dense model, ascending."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    keep_K: Tensor

    def ids(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 [L]."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def logits(self, ids_L: Tensor) -> Tensor:
        """Return the logits of each next token [1, L - 1, V]."""
        logits_BLV: Tensor = self.model(input_ids=ids_L[None], use_cache=False).logits[:, :-1]
        return logits_BLV

    def bits(self, ids_L: Tensor, logits_BLV: Tensor) -> tuple[float, int]:
        """Return the bits of all tokens but the first, and the bytes of these tokens."""
        nats = torch.nn.functional.cross_entropy(logits_BLV[0], ids_L[1:], reduction="sum").item()
        return nats / math.log(2), len(self.tokenizer.decode(ids_L).encode()) - len(
            self.tokenizer.decode(ids_L[:1]).encode()
        )


def judged(dense: Subject, pruned: Subject, text: str) -> dict[str, float]:
    """Return the figures of a pruned model on a text."""
    divergence, bits, size = 0.0, [0.0, 0.0], [0, 0]
    predicted = before = after = lost = 0
    for part in parts_of(text):
        own_L, dense_L = pruned.ids(part), dense.ids(part)
        own_BLV, dense_BLV = pruned.logits(own_L), dense.logits(dense_L)
        is_same = torch.equal(pruned.keep_K[own_L], dense_L)
        same_BLV = dense_BLV if is_same else dense.logits(pruned.keep_K[own_L])
        divergence += kl_divergence(same_BLV[..., pruned.keep_K], own_BLV).sum().item()
        predicted += len(own_L) - 1
        for place, found in enumerate((dense.bits(dense_L, dense_BLV), pruned.bits(own_L, own_BLV))):
            some, length = found
            bits[place] += some
            size[place] += length
        before, after = before + len(dense_L), after + len(own_L)
        lost += int((~torch.isin(dense_L, pruned.keep_K)).sum())
    return {
        "divergence": round(divergence / predicted, 4),
        "bits_per_byte_dense": round(bits[0] / size[0], 4),
        "bits_per_byte": round(bits[1] / size[1], 4),
        "lost": round(lost / before, 4),
        "longer": round(after / before, 4),
    }


def parts_of(text: str) -> Iterator[str]:
    """Yield a text in parts."""
    return (text[start : start + _PART] for start in range(0, len(text), _PART))


def recipe_of(arguments: argparse.Namespace, vocabulary: dict[str, Any] | None) -> dict[str, Any]:
    """Return the recipe with its only shape in place of the budget."""
    calibration = mixed(arguments.data, "four")[1] | {"samples": arguments.windows[0], "self_generated": 0}
    calibration["sequence_length"] = arguments.windows[1]
    data: dict[str, Any] = {"model": {"id": SMOLLM2, "dtype": "float32"}, "calibration": calibration}
    if vocabulary is not None:
        answers = {"dataset": str(arguments.data / "gsm8k_train.jsonl"), "text_field": "answer"}
        texts = [{name: one[name] for name in one if name != "weight"} for one in calibration["sources"]]
        data["vocabulary"] = {"keep_for": [*texts, answers]} | vocabulary
    recipe = Recipe.model_validate(data | {"budget": {"parameters": arguments.size, "axes": ["mlp"]}})
    chosen = TextInputs(recipe).vocabulary
    base = describe_base(recipe, load_config(recipe.model))
    space = search_space(recipe, base, tokens=None if chosen is None else len(chosen.keep_K))
    (found,) = candidates(space, space.members[0]).tried
    (neurons,) = found.shape.neurons.values()
    return data | {"width": {"neurons": neurons, "multiple": 32}, "evaluation": {"generation": False}}


def measured(
    arguments: argparse.Namespace, vocabulary: dict[str, Any] | None, dense: Subject, *, folder: Path
) -> Iterator[dict[str, Any]]:
    """Prune in a folder whose scores serve again, and yield the row of each result."""
    data, settings = recipe_of(arguments, vocabulary), [False] if arguments.unrepaired else [False, {}]
    for refit in settings:
        shutil.rmtree(folder / "run" / "model", ignore_errors=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(data | {"refit": refit}))
        finish(run(recipe, folder / "run"))
        report, keep_K = report_of(folder / "run"), Cut.load(folder / "run" / "cut.json").vocabulary
        model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.float32).eval()
        own = AutoTokenizer.from_pretrained(folder / "run" / "model")
        pruned = Subject(model, own, dense.keep_K if keep_K is None else keep_K)
        yield {
            "size": arguments.size,
            "vocabulary": vocabulary,
            "repaired": refit is not False,
            "calibration": "{} x {}".format(*arguments.windows),
            "tokens": len(pruned.keep_K),
            "coverage": None if keep_K is None else round(report["vocabulary"]["coverage"], 5),
            "neurons": data["width"]["neurons"],
            "parameters": report["pruned"]["parameters"],
            "texts": {name: judged(dense, pruned, text) for name, text in texts_of(arguments)},
        }


def texts_of(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield name and beginning of each judged text."""
    for given in arguments.text:
        name, _, path = given.partition("=")
        yield name, Path(path).read_text(encoding="utf-8", errors="replace")[: arguments.characters]


def keep(row: dict[str, Any]) -> None:
    """Record a row in the place of its like."""
    recorded = RESULTS / "vocabulary.json"
    rows = json.loads(recorded.read_text())["figures"]["rows"] if recorded.is_file() else []
    key = ("size", "vocabulary", "repaired")
    record("vocabulary", {"rows": [old for old in rows if any(old[name] != row[name] for name in key)] + [row]})


def main() -> None:
    """Prune with all tokens and with each vocabulary, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("size", type=float, help="fraction of the parameters")
    parser.add_argument("--vocabulary", action="append", default=[], metavar="SETTINGS", help="YAML, without keep_for")
    parser.add_argument("--only", action="store_true", help="without the run that keeps all tokens")
    parser.add_argument("--unrepaired", action="store_true", help="without the repair")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="text to judge on")
    parser.add_argument("--characters", type=int, default=3000, help="of each text")
    parser.add_argument("--windows", type=int, nargs=2, default=(16, 512), help="calibration: windows, tokens of each")
    arguments = parser.parse_args()
    source = ModelSource(id=SMOLLM2, dtype="float32")
    model = load_model(source).eval()
    dense = Subject(model, load_tokenizer(source), torch.arange(model.config.vocab_size))
    settings = [*([] if arguments.only else [None]), *map(yaml.safe_load, arguments.vocabulary)]
    with tempfile.TemporaryDirectory() as place:
        for vocabulary in settings:
            for row in measured(arguments, vocabulary, dense, folder=Path(place)):
                keep(row)


if __name__ == "__main__":
    main()
