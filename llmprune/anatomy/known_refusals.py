"""What discovery cannot find out from a model's code: data, with the reason beside every entry."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

# Model types, of a whole config or of a part of it, that are not pruned at all.
MODEL_REFUSALS = {
    "gemma3n_text": "its per-layer embeddings and laurel blocks tie layers and widths together; take a Gemma 3 model",
    "glm5_next_text": "its layers hand the tokens that they selected to the next layer",
    "glm_moe_dsa": "its layers hand the tokens that they selected to the next layer",
    "hy_v4": "its layers hand the tokens that they selected to the next layer",
    "mistral_large4_text": "its layers hand the tokens that they selected to the next layer",
    "mllama": "its cross-attention layers run on images only, so that text says nothing about what they are worth; "
    "take a Llama without images",
    "qwen4_exp_text": "its layers pass on several streams of hidden states side by side",
    "xlnet": "it predicts words of a text in any order and is no left-to-right decoder",
    "zaya": "each of its layers hands its router's state to the next one",
}
# Attributes, in any part of a config, with which no model is pruned if anything in them is set.
SHARING_REFUSALS = {
    "kv_sharing_modes": "some of its layers reuse the keys and values of others, which no walk layer by layer carries; "
    "take a model without key-value sharing",
}
# Fields, in any part of a config, that stand for something which layers cannot be removed from under.
DEPTH_REFUSALS = {
    "deepstack_layer_map": "features of images are added between its layers, at positions counted from the first one",
    "deepstack_visual_indexes": "features of images are added after its first layers, which text alone does not show",
}

# Fields that make a model class change the width in its config, by that width: off wherever the width is set.
WIDTH_ADJUSTMENTS = {
    "intermediate_size": {"block_auto_adjust_ff_dim": False},  # LFM2 takes two thirds, rounded up
}


def refused_model(config: PretrainedConfig) -> str | None:
    """Why no model of this config is pruned; None where nothing speaks against it."""
    parts = [config, *_parts(config)]
    reasons = [MODEL_REFUSALS[part.model_type] for part in parts if part.model_type in MODEL_REFUSALS]
    shared = (why for name, why in SHARING_REFUSALS.items() if any(any(getattr(part, name, ())) for part in parts))
    return next(iter([*reasons, *shared]), None)


def refused_depth(config: PretrainedConfig) -> str | None:
    """Why no layer can be removed from a model of this config; None where nothing speaks against it."""
    parts = [config, *_parts(config)]
    return next((why for name, why in DEPTH_REFUSALS.items() if any(getattr(part, name, None) for part in parts)), None)


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield part
