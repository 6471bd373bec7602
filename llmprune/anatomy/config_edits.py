"""Edit a config for a cut: fewer layers, smaller widths, and no prediction heads, which are counted again if kept.

The tables list fields by layer in transformers' config classes. The cut does not rely on them to be complete:
``layer_equivalence.check_layer_equivalence`` compares every kept layer with its counterpart in the model that the
edited config builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from llmprune.anatomy.known_refusals import WIDTH_ADJUSTMENTS, refused_depth
from llmprune.anatomy.meta_model import Config, text_config
from llmprune.common.errors import ModelError

# Lists with one entry a layer, or mappings from layer indices.
LAYER_LISTS = (
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "indexer_types",
    "intermediate_size",  # a list in Gemma 3n; elsewhere a number
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "per_layer_config",
    "swiglu_limits",
    "swiglu_limits_shared",
)
# Lists of layer indices.
INDEX_LISTS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "kv_source_layers",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "rope_scaling_layers",
)
# Lists of layer numbers that start at 1.
NUMBER_LISTS = ("ple_layer_ids",)
# Numbers of first layers that are of a special kind.
PREFIX_COUNTS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers")
# Indices of the last layer of a special kind; -1 is the model's last layer.
LAST_INDICES = ("moe_layer_end_index",)
# Lists of (kinds, number of repetitions).
REPEATED_LISTS = ("attention_types",)
# Lists of kinds that the layers repeat from the first to the last; a list of all layers states each.
CYCLED_LISTS = ("block_types",)
# Periods of mixtures, the last layer of each being one, with the list of indices that can state the other layers.
PERIODS = {"decoder_sparse_step": "mlp_only_layers"}
# Fields that count heads which predict further tokens, or switch them on.
_HEADS = re.compile(
    r"(?=(\w*_)?(mtp|nextn|medusa|eagle)(_|$))"  # the head's kind is a word of the name
    r"(\w*_(layers|modules|depth|heads)|(num|n)_\w+|use_\w+)"  # and the name is that of a count or a switch
)
_IN_A_HEAD = re.compile(r"\w*(_(idx|index|size|dim|factor|attention_heads|kv_heads|key_value_heads|norm)|embeddings)")


def edit_config(config: Config, keep_layers: Sequence[int], *, widths: dict[str, int]) -> Config:
    """Return a config that keeps these layers, in order, and has these values in width fields.

    Raises ModelError where no config can express the cut.
    """
    whole = config.to_dict()
    if not config.is_custom_code():  # no model of transformers itself loads these heads
        clear_heads(whole)
    text = text_config(config)
    fields = whole if text is config else _part_of(whole, config, text=text)
    if len(keep_layers) != text.num_hidden_layers:
        reason = refused_depth(config)
        if reason:
            raise ModelError(f"{config.model_type}: {reason}")
        _keep_layers(fields, text, keep=keep_layers)
    for name, value in widths.items():
        fields[name] = value
        fields |= {key: off for key, off in WIDTH_ADJUSTMENTS.get(name, {}).items() if key in fields}
    try:
        return type(config).from_dict(whole)
    except Exception as error:  # a config class may raise anything for values that it refuses
        raise ModelError(
            f"{config.model_type}: no config expresses this cut: {' '.join(str(error).split())}"
        ) from error


def declared_heads(fields: dict[str, Any]) -> tuple[str, ...]:
    """Return the fields of a config and its parts that declare heads which predict further tokens."""
    return tuple(sorted({key for _, key in _head_fields(fields)}))


def clear_heads(fields: dict[str, Any]) -> None:
    """Set the fields that declare prediction heads to zero or False, in place."""
    for part, key in list(_head_fields(fields)):
        part[key] = type(part[key])(0)


def count_heads_again(config: Config, base: Config) -> Config:
    """Return a copy of an edited config that declares the prediction heads of its base."""
    whole, original = config.to_dict(), base.to_dict()
    _copy_heads(original, whole)
    return type(config).from_dict(whole)


def _copy_heads(original: dict[str, Any], fields: dict[str, Any]) -> None:
    for key, value in original.items():
        if isinstance(value, dict) and isinstance(fields.get(key), dict):
            _copy_heads(value, fields[key])
        elif isinstance(value, int) and value and isinstance(key, str) and counts_heads(key):
            fields[key] = value


def counts_heads(name: str) -> bool:
    """Check that a field's name is that of a count of prediction heads or of their layers."""
    return bool(_HEADS.fullmatch(name)) and not _IN_A_HEAD.fullmatch(name)


def _head_fields(fields: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _head_fields(value)
        elif isinstance(value, int) and value and isinstance(key, str) and counts_heads(key):
            yield fields, key


def _part_of(whole: dict[str, Any], config: Config, *, text: Config) -> dict[str, Any]:
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            part: dict[str, Any] = whole[name]
            return part
    raise ModelError(f"the text part of a {config.model_type!r} config was not found in its own fields")


def _keep_layers(fields: dict[str, Any], text: Config, *, keep: Sequence[int]) -> None:
    count = text.num_hidden_layers
    new_index = {old: new for new, old in enumerate(keep)}
    _state_periods(fields, count, keep=keep)
    for name in LAYER_LISTS:
        value = fields.get(name)
        if isinstance(value, list | tuple) and len(value) == count:
            fields[name] = [value[index] for index in keep]
        elif isinstance(value, dict) and set(map(str, value)) <= set(map(str, range(count))):
            fields[name] = {new_index[int(old)]: entry for old, entry in value.items() if int(old) in new_index}
    for name in REPEATED_LISTS:
        kinds = [kind for pattern, times in fields.get(name) or () for _ in range(times) for kind in pattern]
        if len(kinds) == count:
            fields[name] = [[[kinds[index] for index in keep], 1]]
    for names, first in ((INDEX_LISTS, 0), (NUMBER_LISTS, 1)):
        for name in names:
            if isinstance(fields.get(name), list | tuple):
                fields[name] = [new_index[n - first] + first for n in fields[name] if n - first in new_index]
    for name in PREFIX_COUNTS:
        if (
            isinstance(fields.get(name), int) and fields[name] <= count
        ):  # a larger value means all layers, before and after
            fields[name] = sum(index < fields[name] for index in keep)
    for name in LAST_INDICES:
        if isinstance(fields.get(name), int) and fields[name] >= 0:
            fields[name] = sum(index <= fields[name] for index in keep) - 1
    fields[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)


def _state_periods(fields: dict[str, Any], count: int, *, keep: Sequence[int]) -> None:
    """Replace periods that the kept layers do not follow by lists of all layers of the dense model."""

    def is_followed(period: int) -> bool:
        return all(old % period == new % period for new, old in enumerate(keep))

    for name in CYCLED_LISTS:
        kinds = fields.get(name)
        if isinstance(kinds, list | tuple) and kinds and not is_followed(len(kinds)):
            fields[name] = [kinds[index % len(kinds)] for index in keep]
    for name, listed in PERIODS.items():
        period, others = fields.get(name), fields.get(listed)
        if type(period) is int and period > 1 and isinstance(others, list | tuple) and not is_followed(period):
            outside = {index for index in range(count) if (index + 1) % period}
            fields |= {name: 1, listed: sorted(outside.union(others))}
