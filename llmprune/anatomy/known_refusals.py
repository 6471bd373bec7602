"""Known refusals and adjustments that discovery cannot derive from a model's code, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

# Model types, of a config or of one of its parts, that are not pruned at all.
MODEL_REFUSALS = {
    "gemma3n_text": "its per-layer embeddings and laurel blocks tie layers and widths together; take a Gemma 3 model",
    "glm5_next_text": "its layers pass the tokens that they selected to the next layer",
    "glm_moe_dsa": "its layers pass the tokens that they selected to the next layer",
    "hy_v4": "its layers pass the tokens that they selected to the next layer",
    "idefics": "it reads no text without images, and cross-attention to them is between its layers, by their index; "
    "take Idefics3 or another model that also reads text alone",
    "mistral_large4_text": "its layers pass the tokens that they selected to the next layer",
    "mllama": "its cross-attention layers run on images only, so text cannot show their importance; "
    "take a Llama without images",
    "qwen4_exp_text": "its layers pass on several parallel streams of hidden states",
    "xlnet": "it predicts tokens in any order and is no left-to-right decoder",
    "zaya": "each of its layers passes its router's state to the next one",
}
# Attributes, in any part of a config, that rule out pruning if any of their values is set.
SHARING_REFUSALS = {
    "kv_sharing_modes": "some of its layers reuse the keys and values of others, which no layer-wise forward pass can; "
    "take a model without key-value sharing",
}
# Fields, in any part of a config, that rule out the removal of layers.
DEPTH_REFUSALS = {
    "deepstack_layer_map": "features of images are added between its layers, at positions counted from the first one",
    "deepstack_visual_indexes": "features of images are added after its first layers, which text alone does not show",
}

# By width field, fields that make a model class adjust that width, with the value that turns the adjustment off.
WIDTH_ADJUSTMENTS = {
    "intermediate_size": {"block_auto_adjust_ff_dim": False},  # LFM2 takes two thirds, rounded up
}


def refused_model(config: PretrainedConfig) -> str | None:
    """Return the reason why no model of this config is pruned; None where there is none."""
    parts = [config, *_parts(config)]
    reasons = [MODEL_REFUSALS[part.model_type] for part in parts if part.model_type in MODEL_REFUSALS]
    shared = (why for name, why in SHARING_REFUSALS.items() if any(any(getattr(part, name, ())) for part in parts))
    return next(iter([*reasons, *shared]), None)


def refused_depth(config: PretrainedConfig) -> str | None:
    """Return the reason why no layer can be removed from a model of this config; None where there is none."""
    parts = [config, *_parts(config)]
    return next((why for name, why in DEPTH_REFUSALS.items() if any(getattr(part, name, None) for part in parts)), None)


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield part
