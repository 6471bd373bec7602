"""Kinds of models that are no causal decoders, by the auto classes of transformers that know their type."""

from __future__ import annotations

import re

# Description of a model, by a mapping of transformers' auto classes that has its type; the first that has it decides.
_KINDS = (
    (r"TIME_SERIES\w*", "a model of time series"),
    (r"SPEECH_SEQ_2_SEQ|CTC|AUDIO\w*", "a speech or audio model"),
    (r"TEXT_TO_(WAVEFORM|SPECTROGRAM)", "a speech or audio generator"),
    (r"ZERO_SHOT_IMAGE_CLASSIFICATION", "an encoder of images and texts"),
    (r"VIDEO_CLASSIFICATION|\w*(SEGMENTATION|DETECTION|DEPTH\w*)|MASK_GENERATION|IMAGE\w*_MODELING", "a vision model"),
    (r"IMAGE_CLASSIFICATION|IMAGE|IMAGE_TO_IMAGE|KEYPOINT\w*|BACKBONE", "a vision model"),
    (r"MULTIMODAL_LM", "a model of audio or images and text without an auto class for text alone"),
    (r"SEQ_TO_SEQ_CAUSAL_LM", "an encoder-decoder for text, as for translation"),
    (r"MASKED_LM|NEXT_SENTENCE_PREDICTION|TEXT_ENCODING", "a text encoder, which attends in both directions"),
    (r"\w*CLASSIFICATION|QUESTION_ANSWERING|MULTIPLE_CHOICE", "a classifier"),
)


def describe_kind(model_type: str, *, encodes: bool = False) -> str:
    """Return what a model that is no causal decoder is instead, such as ``a vision model``.

    ``encodes``: its config says that it has an encoder beside the decoder.
    """
    from transformers.models.auto import modeling_auto

    found = [
        (re.fullmatch(r"MODEL_FOR_(\w+)_MAPPING_NAMES", name), types) for name, types in vars(modeling_auto).items()
    ]
    mappings = [match[1] for match, types in found if match and model_type in types]
    kind = next((kind for pattern, kind in _KINDS if any(re.fullmatch(pattern, name) for name in mappings)), None)
    if encodes and (kind is None or "encod" not in kind):
        return f"{kind} with an encoder beside the decoder" if kind else "an encoder-decoder"
    return kind or "a model that predicts no tokens, or that transformers has no AutoModelForCausalLM for"
