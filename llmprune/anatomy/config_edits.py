"""The config of a model with fewer layers or narrower MLPs.

Fields by layer, from transformers' config classes. That the result builds the
very layers that were kept is not trusted to this table: ``proof.prove_twins``
compares every kept layer with its twin in the model that the new config makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmprune.anatomy.blueprint import Config, text_config
from llmprune.errors import ModelError

# One entry a layer.
LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "layers_block_type",
    "activation_sparsity_pattern",
    "layer_rope_theta",
    "attention_layers",
    "per_layer_config",
    "num_attention_heads_per_layer",
)
# Lists of layer indices.
INDEX_LISTS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "ple_layer_ids",
)
# The first so many layers are special.
PREFIX_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")


def edit_config(config: Config, keep_layers: Sequence[int], widths: dict[str, int]) -> Config:
    """A new config that keeps these layers, in order, and sets these width fields."""
    whole = config.to_dict()
    text = text_config(config)
    fields = whole if text is config else _part_of(whole, config, text)
    if len(keep_layers) != text.num_hidden_layers:
        _keep_layers(fields, text, keep_layers)
    for name, value in widths.items():
        fields[name] = value
    return type(config).from_dict(whole)


def _part_of(whole: dict[str, Any], config: Config, text: Config) -> dict[str, Any]:
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            part: dict[str, Any] = whole[name]
            return part
    raise ModelError(f"the text part of a {config.model_type!r} config was not found in its own fields")


def _keep_layers(fields: dict[str, Any], text: Config, keep: Sequence[int]) -> None:
    count = text.num_hidden_layers
    new_index = {old: new for new, old in enumerate(keep)}
    for name in LAYER_LISTS:
        value = fields.get(name)
        if isinstance(value, list | tuple) and len(value) == count:
            fields[name] = [value[index] for index in keep]
        elif isinstance(value, dict) and set(map(str, value)) <= set(map(str, range(count))):
            fields[name] = {new_index[int(old)]: entry for old, entry in value.items() if int(old) in new_index}
    for name in INDEX_LISTS:
        if isinstance(fields.get(name), list | tuple):
            fields[name] = [new_index[index] for index in fields[name] if index in new_index]
    for name in PREFIX_COUNTS:
        if isinstance(fields.get(name), int):
            fields[name] = sum(index < fields[name] for index in keep)
    fields[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
