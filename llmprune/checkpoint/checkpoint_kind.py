"""Recognise checkpoints that are no plain language models, by file names, config and headers of the weights.

They are refused before weights are read, because transformers would load them as something else.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmprune.checkpoint.file_references import INDEX
from llmprune.checkpoint.quantized.formats import quantization_of
from llmprune.checkpoint.weight_headers import SINGLE, Headers
from llmprune.common.errors import ModelError

_POOLING = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_QUANTIZED = ("hf_quant_config.json", "quantization_config.json", "quantize_config.json", "quant_config.json")
_PICKLES = re.compile(
    r"(pytorch_model|consolidated)[\w.-]*\.(bin|pth|pt)|model[\w.-]*\.(ckpt|h5|msgpack)|(flax|tf)_model.*"
)
PIPELINE = "model_index.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_HEADS = {  # by mapping of transformers' auto classes: heads that do not predict the next token
    "SEQUENCE_CLASSIFICATION": "a classifier's or reward model's head",
    "TOKEN_CLASSIFICATION": "a token classifier's head",
    "QUESTION_ANSWERING": "a head that marks answers in a text",
    "MULTIPLE_CHOICE": "a head that chooses among answers",
}
_OTHER_HEADS = re.compile(r"reward|classif|regress|valuehead|embedding|retriev|rerank|ranking", re.IGNORECASE)
_REMEDY = "prune the language model that it was trained from"


def without_config(names: Collection[str], shown: str) -> ModelError:
    """Return the error for a folder or repository without a config.json. ``shown``: its name for the user."""
    if PIPELINE in names:
        return ModelError(
            f"{shown} is a pipeline of diffusers ({PIPELINE}), which generates images, video or sound by several "
            "models; llmprune prunes decoder-only language models"
        )
    inner = sorted({name.split("/")[0] for name in names if re.fullmatch(r"[^/]+/config\.json", name)})
    if len(inner) == 1 or "model" in inner:
        name = "model" if "model" in inner else inner[0]
        of_run = name == "model" and "recipe.yaml" in names
        what = "is the folder of a run" if of_run else "has no config.json at its top"
        return ModelError(f"{shown} {what}, and its checkpoint is in {name}; give {shown.rstrip('/')}/{name}")
    if any(name.endswith(".gguf") for name in names):
        return ModelError(
            f"{shown} has no config.json and no GGUF file at its top; name the file in model.gguf, as folder/FILE.gguf"
        )
    return ModelError(f"the folder {shown} has no config.json; give the folder of a Hugging Face checkpoint")


def has_own_weights(names: Collection[str]) -> bool:
    """Check whether files at the top of a folder include a model's weights, as safetensors or pickled."""
    return SINGLE in names or INDEX in names or any(_PICKLES.fullmatch(name) for name in names)


def names_in(folder: Path) -> list[str]:
    """Return the names of the files of a folder, two levels deep."""
    return [path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern)]


def problems_of_kind(
    names: Collection[str], config: dict[str, Any], *, headers: Headers | None, shown: str, pickles: bool = False
) -> list[str]:
    """Return a sentence for each reason why a checkpoint cannot be pruned.

    ``names``: its files; ``config``: its config.json; ``headers``: of its weights, None where they are not available;
    ``shown``: its name for the user; ``pickles``: pickled weights are read.
    """
    found = [
        _pooling(names, shown) or _head(config, shown),
        _quantization(names, config, headers=headers, shown=shown),
        _pickled(names, config, shown=shown, read=pickles),
    ]
    return [problem for problem in found if problem]


def tokenizer_problem(names: Collection[str], shown: str, *, folder: Path | None = None) -> str | None:
    """Return the reason why no tokenizer can be loaded from files of these names; None where there is none.

    ``folder``: of the files, where they are on this machine.
    """
    models = [name for name in _SENTENCEPIECE if name in names]
    if not models or "tokenizer.json" in names or find_spec("sentencepiece"):
        return None
    if folder is not None and (folder / models[0]).is_file() and _is_text(folder / models[0]):
        return None  # a tiktoken file
    return (
        f"the tokenizer of {shown} is only a SentencePiece file ({models[0]}), which needs a package that is not "
        "installed: pip install sentencepiece, or add a tokenizer.json"
    )


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return all(32 <= byte < 127 or byte in b"\r\n\t" for byte in file.read(64))


def _pooling(names: Collection[str], shown: str) -> str:
    found = next((name for name in (*_POOLING, *names) if name in names and _is_pooling(name)), None)
    if found is None:
        return ""
    return (
        f"{shown} is an embedding model ({found}): its pooling of hidden states would be neither measured nor saved; "
        f"{_REMEDY}"
    )


def _is_pooling(name: str) -> bool:
    return name in _POOLING or re.fullmatch(r"\d+_\w*Pooling/config\.json", name) is not None


def _head(config: dict[str, Any], shown: str) -> str:
    """Return a sentence where all ``architectures`` are classes of transformers without a head for the next token.

    Unknown classes are a repository's own code or old spellings, and no reason to refuse.
    """
    classes = config.get("architectures")
    classes = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    found = [_head_of(name) for name in classes]
    if not found or not all(found):
        return ""
    return f"{shown} has {found[0]} and none that predicts the next token (architectures: {classes[0]}); {_REMEDY}"


def _head_of(name: str) -> str:
    """Describe the head of a class; empty for a head that predicts tokens, and for an unknown class."""
    kinds = _kinds_of_classes().get(name)
    if kinds is None:
        return "a custom head" if _OTHER_HEADS.search(name) else ""
    if kinds == {"MODEL"}:
        return "no head at all, as for embeddings,"
    heads = [_HEADS.get(kind) for kind in sorted(kinds)]
    return heads[0] or "" if all(heads) else ""


@cache
def _kinds_of_classes() -> dict[str, set[str]]:
    """Return the kinds (MODEL, CAUSAL_LM, …) of each model class in transformers' auto mappings."""
    from transformers.models.auto import modeling_auto

    found: dict[str, set[str]] = {}
    for variable, mapping in vars(modeling_auto).items():
        match = re.fullmatch(r"MODEL(?:_FOR_(\w+))?_MAPPING_NAMES", variable)
        if match:
            for names in mapping.values():
                for name in [names] if isinstance(names, str) else names:
                    found.setdefault(name, set()).add(match[1] or "MODEL")
    return found


def _quantization(names: Collection[str], config: dict[str, Any], *, headers: Headers | None, shown: str) -> str:
    stated = quantization_of(config)
    if stated is not None:
        return stated.problem(shown)
    found = next((name for name in _QUANTIZED if name in names), None)
    narrow = sorted({one.dtype for one in (headers or {}).values() if one.dtype.startswith(("F8", "F4", "F6"))})
    if not found and not narrow:
        return ""
    how = " and ".join([*([found] if found else []), *([f"tensors in {', '.join(narrow)}"] if narrow else [])])
    return (
        f"the weights of {shown} are quantized ({how}), and its config.json has no quantization_config that says how "
        "to dequantize them; prune the original in float32, bfloat16 or float16"
    )


def _pickled(names: Collection[str], config: dict[str, Any], *, shown: str, read: bool) -> str:
    top = sorted(name for name in names if "/" not in name)
    if config.get("transformers_weights") or SINGLE in top or INDEX in top:
        return ""
    pickles = [name for name in top if _PICKLES.fullmatch(name)]
    readable = [name for name in pickles if name.startswith("pytorch_model") and name.endswith(".bin")]
    if not pickles or (readable and read):
        return ""
    remedy = "convert the checkpoint to safetensors, or take another revision"
    if readable:
        remedy += ", or set model.pickles: true, which reads them by torch's weights-only loader"
    return (
        f"{shown} has no safetensors weights file but {(readable or pickles)[0]}; pickles can run code, so they are "
        f"not read: {remedy}"
    )
