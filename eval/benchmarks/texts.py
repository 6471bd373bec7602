"""Texts of the quality benchmarks, by kind, and the perplexity of a checkpoint on them.

A folder DATA holds them: ``c4_en.jsonl``, ``wikipedia.jsonl``, ``gsm8k_train.jsonl``, ``gsm8k_test.jsonl``,
``arc_easy_train.jsonl`` and ``wikitext2_test.txt``. Python's manual comes with Python. The last tenth of C4 and of
Wikipedia is held out of the training of ``second_model.py`` and of its calibration.

Shapes in names: N windows, L sequence length, P positions, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.data.begin_of_text import begin_tokens

_AT_ONCE = 128  # positions: of large vocabularies the logits of a window take a gigabyte
HELD_OUT = 10  # percent of the documents of C4 and of Wikipedia, the last ones


def perplexity(folder: Path, windows_NL: torch.Tensor, exact: bool) -> float:
    """Perplexity of a checkpoint. ``exact``: in float32; otherwise in bf16 autocast."""
    return perplexity_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), windows_NL, exact)


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, windows_NL: torch.Tensor, exact: bool) -> float:
    """exp of the mean next-token cross entropy."""
    total = count = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
        for ids_1L in torch.split(windows_NL, 1):
            logits_PV, wanted_P = model(input_ids=ids_1L, use_cache=False).logits[0, :-1], ids_1L[0, 1:]
            for part_PV, part_P in zip(torch.split(logits_PV, _AT_ONCE), torch.split(wanted_P, _AT_ONCE), strict=True):
                total += torch.nn.functional.cross_entropy(part_PV.float(), part_P, reduction="sum").item()
            count += len(wanted_P)
    return math.exp(total / count)


def calibration_sources(data: Path) -> list[dict[str, Any]]:
    """Return C4, Wikipedia and ARC's questions as sources of a recipe, without what is held out."""
    texts = [(data / name, 2) for name in ("c4_en.jsonl", "wikipedia.jsonl")]
    parts = [
        {"dataset": str(path), "split": f"train[:{len(_parts(_field(path))[0])}]", "weight": weight}
        for path, weight in texts
    ]
    return [*parts, {"dataset": str(data / "arc_easy_train.jsonl"), "text_field": "question"}]


def training_documents(data: Path) -> dict[str, list[str]]:
    """Return the documents to train on, by kind."""
    return {
        "c4": _parts(_field(data / "c4_en.jsonl"))[0],
        "wikipedia": _parts(_field(data / "wikipedia.jsonl"))[0],
        "gsm8k": _worked(data / "gsm8k_train.jsonl"),
        "arc": [_answered(row) for row in _rows(data / "arc_easy_train.jsonl")],
    }


def judging_documents(data: Path) -> dict[str, list[str]]:
    """Return the documents that no training and no calibration here has, by kind; the first two are of its kinds."""
    return {
        "c4": _parts(_field(data / "c4_en.jsonl"))[1],
        "wikipedia": _parts(_field(data / "wikipedia.jsonl"))[1],
        "wikitext": [(data / "wikitext2_test.txt").read_text(encoding="utf-8")],
        **unlike_documents(data),
    }


def unlike_documents(data: Path) -> dict[str, list[str]]:
    """Return documents unlike any calibration text here: GSM8K's test questions with answers, and Python's manual."""
    return {"gsm8k": _worked(data / "gsm8k_test.jsonl"), "pydoc": [topics[key] for key in sorted(topics)]}


def given_documents(asked: Sequence[str]) -> dict[str, list[str]]:
    """Return the documents of files that are asked for as NAME=FILE, by name: one of each."""
    pairs = [text.partition("=") for text in asked]
    return {name: [Path(path).read_text(encoding="utf-8", errors="replace")] for name, _, path in pairs}


def windows_of(documents: list[str], tokenizer: PreTrainedTokenizerBase, *, count: int, length: int) -> torch.Tensor:
    """Return the first windows of the joined documents, int64 [N, L]: ``count``, or as many as there are.

    Each begins as the tokenizer begins a text.
    """
    begin = list(begin_tokens(tokenizer))
    joined = "".join(documents)[: 16 * count * length]  # no token of these texts has more characters than that
    ids = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    content = length - len(begin)
    starts = range(0, len(ids) - content + 1, content)[:count]
    return torch.tensor(list(chain.from_iterable(begin + ids[at : at + content] for at in starts))).view(-1, length)


def _parts(documents: list[str]) -> tuple[list[str], list[str]]:
    """Split documents into those to train and calibrate on, and those to judge on."""
    kept = len(documents) * (100 - HELD_OUT) // 100
    return documents[:kept], documents[kept:]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _field(path: Path) -> list[str]:
    return [f"{row['text']}\n\n" for row in _rows(path)]


def _worked(path: Path) -> list[str]:
    return [f"{row['question']}\n{row['answer']}\n\n" for row in _rows(path)]


def _answered(row: dict[str, Any]) -> str:
    """Return a question with its right answer."""
    choices = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return f"{row['question']}\n{choices[row['answerKey']]}\n\n"
