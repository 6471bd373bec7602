"""The rule of every free text in a recipe, by its key. A key without a rule is refused."""

from __future__ import annotations

import re
from pathlib import Path

from llmprune.service.recipe_policy.allowed_paths import hub_id_or_path, speed_table, task_folder, tokens_file
from llmprune.service.recipe_policy.free_text import FreeText, NotAllowedError, Rule
from llmprune.service.settings import Settings

_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]{0,120}", re.ASCII)
_GGUF = re.compile(r"(?!.*\.\.)\w[\w.+-]{0,120}(/\w[\w.+-]{0,120}){0,4}", re.ASCII)  # below the model's own folder
_WORD = re.compile(r"(?!.*\.\.)[\w.+:,-]{1,120}", re.ASCII)
_TASK = re.compile(r"(?!.*\.ya?ml$)[\w+-][\w.+-]{0,119}", re.ASCII)  # no path and no glob: lm-eval would load both
_COLUMN = re.compile(r"[^/\\\x00-\x1f]{1,120}")
_LABEL = re.compile(r"[^/\\\x00-\x1f]{1,120}")  # of a source, for people
_PATTERN = re.compile(r"\d{1,4}:\d{1,4}", re.ASCII)
_MATRIX = re.compile(r"[\w.*?-]{1,120}", re.ASCII)  # matched against a few dozen names
_SPLIT = re.compile(r"[\w.\[\]:%()+ -]{1,120}", re.ASCII)
_INDEX = re.compile(r"\.\d+(?=\.|$)")  # the index of a list entry in a key


def rule_of(key: str) -> Rule | None:
    """Return the rule of a key, such as ``evaluation.tasks.0`` or ``model.device_map.lm_head``; None: refused."""
    return RULES.get(_INDEX.sub("[]", key)) or next(
        (rule for head, rule in MAPPING_RULES.items() if key.startswith(f"{head}.")), None
    )


def may_be_path(key: str) -> bool:
    """Return whether the text of a key may name a file or folder."""
    return rule_of(key) in (hub_id_or_path, tokens_file, speed_table, task_folder)


def _matches(pattern: re.Pattern[str], remedy: str) -> Rule:
    def rule(text: FreeText, _: Settings) -> Path | None:
        if not pattern.fullmatch(text.value):
            raise NotAllowedError(remedy)
        return None

    return rule


_word = _matches(_WORD, "give a plain word")
_revision = _matches(_REVISION, "give a branch, tag or commit")
_column = _matches(_COLUMN, "give the name of a column")
_matrix = _matches(_MATRIX, "give the name of a matrix, or a pattern with * and ?")
_tensor = _matches(_COLUMN, "give the name of a tensor")
_TEXT: dict[str, Rule] = {
    "dataset": hub_id_or_path,
    "revision": _revision,
    "config": _word,
    "split": _matches(_SPLIT, "give a split such as train[:80%]"),
    "text_field": _column,
    "messages_field": _column,
    "images_field": _column,
    "tokens": tokens_file,
    "key": _tensor,
    "name": _matches(_LABEL, "give a name of up to 120 characters, without a path"),
    "licence": _matches(_LABEL, "give the licence in up to 120 characters, without a path"),
}
_OTHER_KEYS = ("tokens", "key")  # of token windows, which are no text
RULES: dict[str, Rule] = (
    {
        "model.id": hub_id_or_path,
        "model.revision": _revision,
        "model.gguf": _matches(_GGUF, "give the name of a GGUF file of the model"),
        "model.base": hub_id_or_path,
        "model.base_revision": _revision,
        "budget.speed_table": speed_table,
        "recover.against": hub_id_or_path,
        "recover.against_revision": _revision,
        "evaluation.against": hub_id_or_path,
        "evaluation.against_revision": _revision,
        "model.device_map": _word,
        "calibration.mix": _word,
        "calibration.source_key": _tensor,
        "recover.data.mix": _word,
        "sparsity.pattern": _matches(_PATTERN, 'give N:M, such as "2:4"'),
        "sparsity.targets[]": _matrix,
        "sparsity.skip[]": _matrix,
        "evaluation.tasks[]": _matches(_TASK, "give the name of an lm-eval task"),
        "evaluation.suite": _word,
        "evaluation.include_path": task_folder,
    }
    | {
        f"{section}{entry}.{name}": rule
        for section in ("calibration", "evaluation.perplexity", "recover.data")
        for entry in ("", ".sources[]")
        for name, rule in _TEXT.items()
    }
    | {f"vocabulary.keep_for[].{name}": rule for name, rule in _TEXT.items() if name not in _OTHER_KEYS}
)
MAPPING_RULES: dict[str, Rule] = {"model.device_map": _word, "evaluation.metrics": _word}
# Refused as a whole. The arguments of a backend are addresses and code (model_args, trust_remote_code). A push at the
# end of a run would use the operator's credentials, or a token stored for hours; finished jobs are pushed instead
# (POST /v1/jobs/{job}/push).
CLOSED_SECTIONS = ("evaluation.backend", "hub")
