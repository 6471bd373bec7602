"""Find the tensors that have a row or column for each token: build the model with another number of tokens and compare.

A reload proves the result: the logits of the kept tokens must equal those of the whole vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.config_probe import build_representative
from llmprune.anatomy.meta_model import Config, build_meta_model, find_layers, text_config
from llmprune.common.errors import ModelError

FIELD = "vocab_size"
_PROBED = 8  # tokens that are left out to compare
_VOCABULARY = re.compile(r"\w*vocab\w*")
# Fields whose value is the id of a token, or a list of ids.
_IDS = re.compile(r"(\w+_)?(token_(id|ids|idx|index)|tokens_ids?)")
# Lists of token ids that generation never writes; an id that is gone needs no entry.
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# Settings of generation that contain ids in other forms.
_UNREAD = ("forced_decoder_ids", "force_words_ids", "sequence_bias", "constraints")


@dataclass(frozen=True)
class VocabularyDims:
    """Dimension of each tensor that has an entry for each of ``tokens`` tokens, by the tensor's name in the model."""

    tokens: int
    dims: dict[str, int]


def find_vocabulary(model: PreTrainedModel, *, trust_remote_code: bool) -> VocabularyDims:
    """Return the tensors with the vocabulary's dimension. Raises ModelError where the vocabulary cannot be cut.

    ``model``: the whole model, on the meta device.
    """
    config = text_config(model.config)
    tokens = getattr(config, FIELD, None)
    if not isinstance(tokens, int):
        raise ModelError(_refusal(model.config, f"its config has no {FIELD}"))
    others = [name for name, value in config.to_dict().items() if _is_other_size(name, value)]
    if others:
        raise ModelError(_refusal(model.config, f"{others[0]} sets the size of further tensors by token"))
    dims = _dims(model, tokens, trust_remote_code=trust_remote_code)
    if not dims:
        raise ModelError(_refusal(model.config, f"no tensor has the size of {FIELD}"))
    return VocabularyDims(tokens, dims)


def _dims(model: PreTrainedModel, tokens: int, *, trust_remote_code: bool) -> dict[str, int]:
    small = build_representative(model, trust_remote_code).model
    named = named_ids(small.config.to_dict(), tokens)  # the padding token, for one, must have a row
    removed = [index for index in reversed(range(tokens)) if index not in named][:_PROBED]
    keep_K = torch.tensor([index for index in range(tokens) if index not in removed])
    probe = len(keep_K)
    after = _without(small.config, keep_K, trust_remote_code=trust_remote_code)
    path, _ = find_layers(small)
    names, changed = _tensors(small), _tensors(after)
    if names.keys() != changed.keys():
        raise ModelError(_refusal(model.config, "it has other tensors with another number of tokens"))
    dims: dict[str, int] = {}
    for name, tensor in names.items():
        shape, other = list(tensor.shape), list(changed[name].shape)
        differing = [dim for dim, (old, new) in enumerate(zip(shape, other, strict=True)) if old != new]
        if not differing:
            continue
        if len(differing) > 1 or (shape[differing[0]], other[differing[0]]) != (tokens, probe):
            raise ModelError(_refusal(model.config, f"{name} is {shape}, and {other} with {probe:,} tokens"))
        if name.startswith(f"{path}."):
            raise ModelError(_refusal(model.config, f"its layers have tensors by token ({name})"))
        dims[name] = differing[0]
    return dims


def _is_other_size(name: str, value: Any) -> bool:
    return name != FIELD and isinstance(value, int) and value > 1 and bool(_VOCABULARY.fullmatch(name))


def _without(config: Config, keep_K: Tensor, *, trust_remote_code: bool) -> PreTrainedModel:
    try:
        return build_meta_model(vocabulary_config(config, keep_K), trust_remote_code=trust_remote_code)
    except Exception as error:  # a model class may fail in any way on a value that it does not expect
        raise ModelError(_refusal(config, f"it cannot be built with {len(keep_K):,} tokens ({error})")) from error


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def vocabulary_config(config: Config, keep_K: Tensor) -> Config:
    """Return a config with only the kept tokens, whose ids are the new ones in every field that names a token.

    Raises ModelError where no config can express that.
    """
    text, new_ids = text_config(config), new_ids_of(keep_K)
    tokens = getattr(text, FIELD)
    whole = edit_config(config, range(text.num_hidden_layers), widths={FIELD: len(keep_K)}).to_dict()
    try:
        return type(config).from_dict(renumber(whole, new_ids, tokens=tokens))
    except Exception as error:  # a config class may raise anything for values that it refuses
        raise ModelError(_refusal(config, f"its config takes no other token ids ({error})")) from error


def some_tokens(config: Config, number: int) -> Tensor:
    """Return the ids of ``number`` tokens, ascending, int64 [K]: those that the config names, and the first others."""
    tokens = getattr(text_config(config), FIELD)
    named = named_ids(config.to_dict(), tokens)
    others = [index for index in range(tokens) if index not in named]
    return torch.tensor(sorted([*named, *others[: max(number - len(named), 0)]]))


def new_ids_of(keep_K: Tensor) -> dict[int, int]:
    """Return the new id of each kept token, by its old one: its rank."""
    return {old: new for new, old in enumerate(keep_K.tolist())}


def renumber(fields: Any, new_ids: Mapping[int, int], *, tokens: int) -> Any:
    """Return fields of a config, or of settings of generation, with new token ids.

    Ids of ``tokens`` and above, and below zero, name no token and stay; all others must be kept. Raises ModelError for
    settings of generation that contain ids in a form that is not read.
    """
    if isinstance(fields, list):
        return [renumber(one, new_ids, tokens=tokens) for one in fields]
    if not isinstance(fields, dict):
        return fields
    result = {}
    for name, value in fields.items():
        if name in _UNREAD and value:
            raise ModelError(f"vocabulary: generation settings name tokens in {name}; remove it from the base's files")
        if name in _SUPPRESSED and isinstance(value, list):
            result[name] = _left(value, new_ids)
        elif isinstance(name, str) and _IDS.fullmatch(name):
            result[name] = _renumbered(value, new_ids, tokens=tokens)
        else:
            result[name] = renumber(value, new_ids, tokens=tokens)
    return result


def named_ids(fields: Any, tokens: int) -> set[int]:
    """Return the ids of tokens below ``tokens`` that the fields of a config name."""
    if isinstance(fields, list):
        return {index for one in fields for index in named_ids(one, tokens)}
    if not isinstance(fields, dict):
        return set()
    found: set[int] = set()
    for name, value in fields.items():
        if isinstance(name, str) and _IDS.fullmatch(name):
            found |= {index for index in (value if isinstance(value, list) else [value]) if _is_id(index, tokens)}
        else:
            found |= named_ids(value, tokens)
    return found


def _is_id(value: Any, tokens: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < tokens


def _renumbered(value: Any, new_ids: Mapping[int, int], *, tokens: int) -> Any:
    if isinstance(value, list):
        return [_renumbered(one, new_ids, tokens=tokens) for one in value]
    return new_ids[value] if _is_id(value, tokens) else value


def _left(ids: list[Any], new_ids: Mapping[int, int]) -> list[Any]:
    """Return suppressed ids, or sequences of ids, without those that have a removed token."""
    if any(isinstance(one, list) for one in ids):
        return [[new_ids[index] for index in one] for one in ids if all(index in new_ids for index in one)]
    return [new_ids[index] for index in ids if index in new_ids]


def _refusal(config: Config, reason: str) -> str:
    return f"vocabulary: the tokens of a model of type {config.model_type!r} cannot be cut: {reason}; remove vocabulary"
