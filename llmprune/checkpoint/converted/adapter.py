"""Read an adapter of peft: its settings, the model that it belongs to, and whether it can be merged.

An adapter's files are not trusted. Of the names in them only a hub id of the base is followed, and never with that
base's own Python code; a folder as base, or code, has to be named in the recipe (``model.base``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.checkpoint.copied_files import is_tokenizer
from llmprune.checkpoint.file_references import ADAPTER
from llmprune.common.errors import ModelError
from llmprune.recipe.model import ModelSource

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Kinds whose matrices change the base's own, and which were merged here to the same weights as by peft as a whole.
_MERGED = {
    *("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "VERA", "FOURIERFT"),
}
_IN_FRONT = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"}
# Settings that a merge cannot express, or that import other code, with the reason.
_REFUSED = {
    "megatron_config": "it is made for Megatron",
    "layer_replication": "it repeats layers of its base",
    "alora_invocation_tokens": "it changes the weights only after certain tokens (activated LoRA)",
}
_STARTS = ("gaussian", "eva", "orthogonal")  # initial values of an adapter which leave the base as it is
_TASKS = {
    "SEQ_CLS": "a classifier's or reward model's head",
    "TOKEN_CLS": "a token classifier's head",
    "QUESTION_ANS": "a head that marks answers in a text",
    "FEATURE_EXTRACTION": "no head at all, as for embeddings",
    "SEQ_2_SEQ_LM": "an encoder beside the decoder",
}
_MERGE_IT = "merge it with peft (merge_and_unload, save_pretrained), and give the folder of the merged model"


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder. ``fields``: of its config; ``shown``: its name for the user."""

    folder: Path
    fields: dict[str, Any]
    shown: str

    @property
    def kind(self) -> str:
        """The kind of adapter as peft names it, such as LORA."""
        return str(self.fields.get("peft_type"))

    @property
    def small_files(self) -> list[Path]:
        """The files of its tokenizer, sorted; none where it has the base's."""
        return sorted(path for path in self.folder.iterdir() if path.is_file() and is_of_tokenizer(path.name))


def is_of_tokenizer(name: str) -> bool:
    """Check by its name that a file of an adapter's folder replaces the base's: of the tokenizer, or a template."""
    return "/" not in name and (is_tokenizer(name) or name in _BESIDE)


def read_adapter(folder: Path, shown: str) -> Adapter:
    """Read an adapter's config. Raises ModelError where the adapter cannot be merged, with the reason."""
    try:
        fields = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"the {ADAPTER} of {shown} cannot be read ({error}); fetch it again") from error
    if not isinstance(fields, dict):
        raise ModelError(f"the {ADAPTER} of {shown} is no JSON object; fetch it again")
    adapter = Adapter(folder, fields, shown)
    problem = _problem(adapter)
    if problem:
        raise ModelError(problem)
    return adapter


def _problem(adapter: Adapter) -> str | None:
    """Return the reason why an adapter cannot be merged, with the remedy."""
    fields, kind, shown = adapter.fields, adapter.kind, adapter.shown
    if kind in _IN_FRONT:
        return (
            f"{shown} is an adapter of kind {kind}, which puts trained vectors in front of the text and changes no "
            "weights, so it cannot be merged into a checkpoint; prune its base model alone"
        )
    if kind not in _MERGED:
        return f"{shown} is an adapter of kind {kind}, which is not merged here; {_MERGE_IT} where peft can"
    task = fields.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        has = _TASKS.get(str(task), "another head")
        return (
            f"{shown} is an adapter for {task}: its model has {has}, and none that predicts the next token; prune the "
            "language model that it was trained from"
        )
    for name, reason in _REFUSED.items():
        if fields.get(name):
            return f"{shown} cannot be merged here: {reason} ({name} in its {ADAPTER}); {_MERGE_IT} where peft can"
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _STARTS:
        return (
            f"{shown} starts from weights that it takes out of its base (init_lora_weights: {start[:40]}), so the base "
            f"alone does not say what to merge into; {_MERGE_IT}, or save the adapter as a plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
    return _problem_of_weights({path.name for path in adapter.folder.iterdir()}, shown)


def _problem_of_weights(names: Collection[str], shown: str) -> str | None:
    if ADAPTER_WEIGHTS in names:
        return None
    if _PICKLE in names:
        return (
            f"{shown} has its adapter's weights in {_PICKLE}; only safetensors are read, never pickles, which can run "
            "code: load it with peft and save it again"
        )
    return f"{shown} is an adapter without its weights ({ADAPTER_WEIGHTS}); fetch it again"


def base_of(adapter: Adapter, source: ModelSource) -> ModelSource:
    """Return the source of the model that an adapter is merged into.

    ``source``: of the adapter, whose ``base`` overrides the name in the adapter's config. Raises ModelError where the
    adapter names none that is followed.
    """
    if source.base is not None:
        return source.at(source.base, source.base_revision)
    named = adapter.fields.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(
            f"{adapter.shown} is an adapter that does not name its base model; set model.base to it (hub id or folder)"
        )
    if not _HUB_ID.fullmatch(named) or ".." in named or Path(named).expanduser().exists():
        raise ModelError(
            f"{adapter.shown} is an adapter for the model in the folder {named[:120]!r}, and a name in an adapter's "
            "files is followed only to the hub; set model.base to that folder if it is the right one"
        )
    revision = adapter.fields.get("revision")
    base = source.at(named, revision if isinstance(revision, str) and revision else "main")
    return base.model_copy(update={"trust_remote_code": False})
