"""Files of the result: verified weights, copied files of the base, GGUF files, quantized weights."""

from __future__ import annotations

from pydantic import Field

from llmprune.results.figures.base import Figures


class VerificationFigures(Figures):
    """Comparison of the run's model with the checkpoint that plain transformers loaded in a fresh process."""

    parameters: int
    largest_logit_difference: float  # between the run's own logits and the reloaded model's
    cached_generation_equal: bool
    positions: int  # token positions whose logits were compared


class BaseFiles(Figures):
    """Files of the base model other than weights: copied byte for byte, or not copied for a reason."""

    carried: tuple[str, ...] = ()
    left: dict[str, str] = Field({})  # reason, by path
    rewritten: tuple[str, ...] = ()  # for fewer tokens


class GgufFigures(Figures):
    """One exported GGUF file."""

    kind: str  # as llama.cpp names it
    file: str  # path within the run folder
    bytes: int


class RequantizedFigures(Figures):
    """The result in its base's quantized format, in the folder ``quantized``."""

    format: str
    weights: int  # that are quantized
    bytes: int
    divergence: float  # KL divergence from the unquantized result in nats per token, on calibration text
