"""The recipe's ``recover`` section: training of the pruned model on the dense model's predictions.

Defaults follow published recoveries of pruned models of 0.1 to 70 B parameters: Minitron (arXiv 2408.11796) and
LLM-Pruner (arXiv 2305.11627), with the learning rate scaled by the hidden size as in muP (arXiv 2203.03466).
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmprune.common.schema import Section
from llmprune.recipe.calibration import Calibration, TokenWindows
from llmprune.recipe.mixes import MixName, read_mix
from llmprune.recipe.repository_names import RepositoryName
from llmprune.recipe.text_source import TextSource

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_MOST_TOKENS = 10**13
_MOST_GENERATED, _GENERATED_AN_HOUR = 512, 64  # windows that the dense model writes by itself
_HELD_OUT_SHARE = 4  # of few windows, one in four is held out
_TOKENS_AT_ONCE = {False: 1024, True: 8192}  # on the CPU and on a GPU: larger products are hardly faster
_RATE, _RATE_WIDTH, _LORA_RATE = 2e-4, 576, 2e-4  # of AdamW, at this hidden size; LoRA's does not depend on it


def parse_count(value: Any) -> int:
    """Return the tokens of a count such as ``500K``, ``20M``, ``1.5B`` or a plain number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([KMB]?)\s*", str(value))
        if match is None:
            raise ValueError("a number of tokens, optionally with a unit, such as 500K, 20M or 1.5B")
        count = round(float(match[1]) * _COUNTS[match[2]])
    if count <= 0:
        raise ValueError("a number of tokens must be above zero, such as 500K or 20M")
    if count > _MOST_TOKENS:
        raise ValueError("a number of tokens is at most 10000B")
    return count


Count = Annotated[int, BeforeValidator(parse_count)]


class SelfGenerated(Section):
    """Windows for training that the dense model writes itself."""

    samples: int = Field(gt=0, description="Number of windows.")
    temperature: float = Field(1.0, gt=0, le=2, description="Sampling temperature.")
    chat: bool = Field(
        True, description="Half of the windows begin as answers in the chat template, where the tokenizer has one."
    )


class RecoveryText(TokenWindows):
    """Text that the model is trained on; windows that calibration saw are left out."""

    _ORIGINS: ClassVar[str] = "at most one of dataset, sources, tokens or mix"
    _SHARED: ClassVar[tuple[str, ...]] = ("sequence_length", "documents", "bos", "seed")  # with the calibration

    mix: MixName | None = Field(
        None,
        description="Name of a ready mix of hub data sets; left out with dataset, sources and tokens: the "
        "calibration's text.",
    )
    self_generated: Annotated[int, Field(ge=0)] | SelfGenerated | Literal["auto", False] = Field(
        "auto",
        description="Number of windows that the dense model writes itself: a source of its own. A mapping, such as "
        "{samples: 512, chat: false}, also says how they are sampled. auto: half of the tokens, of `hours` 64 windows "
        "an hour, at most 512 windows, where the devices hold the whole model; 0 or false: none.",
    )

    @field_validator("self_generated")
    @classmethod
    def _as_settings(cls, given: int | SelfGenerated | str) -> SelfGenerated | str | bool:
        """Return the settings of a number of windows alone; False for 0."""
        if isinstance(given, int):
            return SelfGenerated(samples=given) if given else False
        return given

    @model_validator(mode="after")
    def _no_samples(self) -> Self:
        if self.samples is not None:
            raise ValueError("samples belongs to calibration: recover.tokens says how much is trained on; remove it")
        return self

    def _origins(self) -> list[str]:
        given = super()._origins()
        named = given if self.mix is None else [*given, "mix"]
        return named or ["calibration"]

    @property
    def is_calibrations(self) -> bool:
        """True where the text is that of the calibration."""
        return self._origins() == ["calibration"]

    def text_sources(self) -> tuple[TextSource, ...]:
        """Return the sources of text, those of the mix included; empty for ready tokens and the calibration's text."""
        return read_mix(self.mix) if self.mix else super().text_sources()

    def resolved(self, calibration: Calibration) -> TokenWindows:
        """Return the text as it is read: what is left out is the calibration's, window length and seed included."""
        origin: TokenWindows = calibration if self.is_calibrations else self
        read: dict[str, Any] = {"tokens": origin.tokens, "key": origin.key}
        if not origin.tokens:
            read = {"sources": tuple(source for source in origin.text_sources() if source.images_field is None)}
        own = {key: getattr(self, key) for key in self._SHARED if key in self.model_fields_set}
        shared = {key: getattr(calibration, key) for key in self._SHARED}
        shared["sequence_length"] = (self.stored_shape() or calibration.read_shape())[1]
        return TokenWindows.model_construct(**read | shared | own)


class Lora(Section):
    """Settings of ``method: lora``; the adapters are merged into the weights at the end (arXiv 2106.09685)."""

    rank: int = Field(32, gt=0, description="Rank of the adapters.")
    alpha: int = Field(64, gt=0, description="The adapters are multiplied by alpha / rank.")


class Recover(Section):
    """Training after the cut, such as ``recover: {tokens: 20M}``: the best weights by held-out divergence are saved."""

    tokens: Count | None = Field(None, description="Tokens to train on, such as 500K, 20M or 1B.")
    hours: float | None = Field(
        None, gt=0, description="Time to train for, in place of tokens; their number follows from the first steps."
    )
    method: Literal["full", "lora"] = Field(
        "full",
        description="full: all weights of the layers; lora: low-rank adapters of the layers' matrices, which need less "
        "memory.",
    )
    embeddings: bool = Field(
        False,
        description="Train embeddings and head too, with method: full. Without them a model keeps more on text unlike "
        "that of the training, and needs less memory.",
    )
    lora: Lora = Field(Lora(), description="Settings of `method: lora`.")
    loss: Literal["distillation", "language_model"] = Field(
        "distillation",
        description="distillation: KL divergence from the dense model's next-token distributions; language_model: "
        "cross entropy of the text alone.",
    )
    top_k: int = Field(
        64, gt=0, description="Tokens whose dense logits are stored at each position; the rest is one class."
    )
    temperature: float = Field(1.0, gt=0, description="Temperature of both distributions in the distillation.")
    hidden_states: float = Field(
        0.0,
        ge=0,
        description="Weight of a second loss: relative squared error of the hidden states after each kept layer, "
        "against those of the dense model after that layer and the removed ones behind it. Needs the dense "
        "model beside the pruned one.",
    )
    against: RepositoryName | None = Field(
        None,
        description="Hub id or folder of the dense model, where `model` is already pruned, or first_base as in "
        "`evaluation.against`; left out: `evaluation.against`, else `model` itself. Scores, perplexity and answers are "
        "then compared with this model's. It may have more tokens than `model`, which lost some.",
    )
    against_revision: str = Field("main", description="Branch, tag or commit of the hub model `against`.")
    data: RecoveryText = Field(RecoveryText(), description="Text to train on; left out: the calibration's sources.")
    learning_rate: float | Literal["auto"] = Field(
        "auto",
        description="Highest learning rate; auto: 2e-4 at a hidden size of 576, in inverse proportion to it, and 2e-4 "
        "for LoRA.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay of the learning rate after the warm-up, to a tenth at the end."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    batch_tokens: Count | Literal["auto"] = Field(
        "auto",
        description="Tokens of an optimiser step; auto: a 250th of all tokens, from 1,024 to 262,144, in whole "
        "windows.",
    )
    check_every: int | Literal["auto"] = Field(
        "auto", description="Steps between two measurements on held-out windows; auto: a tenth of all steps."
    )
    held_out: int = Field(8, gt=0, description="Windows of each source that are not trained on and judge the training.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of the products; trained weights are float32 in any case. auto: bfloat16 where the device "
        "has instructions for it.",
    )
    checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Compute what a layer keeps for its gradients again in the backward pass: less memory, a third "
        "more time, the same weights. auto: on a GPU, and where the memory would not suffice otherwise.",
    )
    rounds: int = Field(
        1,
        gt=0,
        le=10,
        description="Times that the model is cut further and trained; the last reaches the sizes asked for.",
    )

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, rate: float | str) -> float | str:
        if isinstance(rate, float) and not 0 < rate < 1:
            raise ValueError("a learning rate lies between 0 and 1, such as 1e-4")
        return rate

    @field_validator("check_every")
    @classmethod
    def _at_least_one(cls, steps: int | str) -> int | str:
        if isinstance(steps, int) and steps < 1:
            raise ValueError("a number of steps, at least 1, or auto")
        return steps

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.tokens is None) == (self.hours is None):
            raise ValueError("needs exactly one of tokens and hours, such as {tokens: 20M}")
        if self.embeddings and self.method == "lora":
            raise ValueError("embeddings belongs to method: full; remove it")
        if self.loss == "language_model" and self.hidden_states:
            raise ValueError("hidden_states belongs to loss: distillation; remove it")
        return self

    @property
    def of_round(self) -> Recover:
        """The training of one of the rounds, which all have equal shares of the tokens or hours."""
        tokens = None if self.tokens is None else math.ceil(self.tokens / self.rounds)
        hours = None if self.hours is None else self.hours / self.rounds
        return self.model_copy(update={"tokens": tokens, "hours": hours, "rounds": 1})

    def rate(self, hidden_size: int) -> float:
        """Return the highest learning rate for a model of this hidden size."""
        if self.learning_rate != "auto":
            return self.learning_rate
        return _LORA_RATE if self.method == "lora" else _RATE * _RATE_WIDTH / hidden_size

    def windows_of_step(self, tokens: int, length: int) -> int:
        """Return the windows of an optimiser step, for a training on ``tokens`` in windows of ``length``."""
        wanted = min(max(tokens // 250, 1024), 262_144) if self.batch_tokens == "auto" else self.batch_tokens
        return max(wanted // length, 1)

    def windows_at_once(self, length: int, *, on_gpu: bool) -> int:
        """Return the windows whose activations are in memory together, before any number is found to be too large."""
        asked = self.data.batch_size
        return max(_TOKENS_AT_ONCE[on_gpu] // length, 1) if asked == "auto" else asked

    def steps(self, tokens: int, length: int) -> int:
        """Return the number of optimiser steps for ``tokens`` in windows of ``length``; at least 1."""
        return max(math.ceil(tokens / (self.windows_of_step(tokens, length) * length)), 1)

    def windows(self, tokens: int, length: int) -> int:
        """Return the windows of all steps, which are whole: at least ``tokens`` tokens."""
        return self.steps(tokens, length) * self.windows_of_step(tokens, length)

    def held_out_of(self, windows: int) -> int:
        """Return how many of a source's windows are held out: ``held_out``, at most a quarter of them."""
        return min(self.held_out, math.ceil(windows / _HELD_OUT_SHARE))

    def generated(self, length: int) -> int:
        """Return the windows of ``length`` that the dense model writes itself, those that are held out included."""
        chosen = self.data.self_generated
        if isinstance(chosen, SelfGenerated):
            return chosen.samples
        if chosen != "auto":
            return 0
        if self.tokens is None:
            assert self.hours is not None, "one of them is given"
            return min(math.ceil(_GENERATED_AN_HOUR * self.hours), _MOST_GENERATED)
        trained = self.windows(self.tokens, length) // 2
        return min(trained + min(self.held_out, math.ceil(trained / (_HELD_OUT_SHARE - 1))), _MOST_GENERATED)

    def windows_of_text(self, windows: int, length: int) -> int:
        """Return how many of a training's windows are read, beside those that the dense model writes itself."""
        generated = self.generated(length)
        return max(windows - (generated - self.held_out_of(generated)), 0)

    def steps_between_checks(self, steps: int) -> int:
        """Return the number of steps between two measurements on held-out windows."""
        return max(steps // 10, 1) if self.check_every == "auto" else self.check_every
