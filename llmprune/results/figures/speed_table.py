"""Times of a model's parts on one machine, from which the speed of any smaller shape of the model is predicted."""

from __future__ import annotations

from math import sqrt

from llmprune.results.figures.base import Figures

_HALF_WIDTH = 1.82  # 1.96 standard errors of a median of normal values, in interquartile ranges / √n


class PartTimes(Figures):
    """Seconds of one part of a model: in the prefill of a batch, and in the decoding of one token of each prompt."""

    prefill: float
    decode: float


class PartAt(PartTimes):
    """Times of a part with some of its units or tokens. ``at``: fraction of the dense model's number."""

    at: float


class ModelSizes(Figures):
    """Sizes of a dense model that its speed depends on. ``widths``: by config field, of those that can be cut."""

    model_type: str
    layers: int
    hidden_size: int | None
    vocabulary: int | None
    widths: dict[str, int]
    kv_groups: int | None  # None: no heads can be removed
    experts: int | None  # None: no experts can be removed
    top_k: int | None
    parameters: int


class SpeedTable(Figures):
    """Times of one model's parts, measured with greedy generation of models with random weights of real sizes.

    ``outside``: times of embeddings, head, and everything else that is not in a layer. What the first and last layers
    differ from those between them is counted here, so that it can be negative.
    ``attention``: times of a layer without the part that grows with the MLP's width; the whole layer where no width can
    be cut. ``mlp``: times of that part, by width; empty where no width can be cut. ``experts``: change of a layer's
    times with fewer experts of full width; empty where none can be removed. ``vocabulary``: change of the times outside
    the layers with fewer tokens; empty where none can be removed. Each is sorted by ``at`` and ends with 1.
    """

    model: str
    sizes: ModelSizes
    dtype: str
    device: str
    versions: dict[str, str]  # of torch and transformers
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    layers_timed: int  # layers of the models that were timed
    rounds: int
    spread: float  # interquartile range / median of the ratio of two models' times over the rounds, the largest
    outside: PartTimes
    attention: tuple[PartAt, ...]
    mlp: tuple[PartAt, ...]
    experts: tuple[PartAt, ...]
    vocabulary: tuple[PartAt, ...]

    @property
    def uncertainty(self) -> float:
        """Half of the 95 % confidence interval of a measured ratio, as a fraction of it."""
        return uncertainty(self.spread, self.rounds)


def uncertainty(spread: float, rounds: int) -> float:
    """Return half of the 95 % confidence interval of a median. ``spread``: interquartile range of the values."""
    return _HALF_WIDTH * spread / sqrt(rounds)


class SpeedPrediction(Figures):
    """Predicted generation speed of a shape."""

    prefill: float  # seconds of a batch
    decode: float  # seconds of one token of each prompt
    tokens_per_second: float  # new tokens of all prompts / seconds of prefill and decoding together
    ratio: float  # tokens per second / those of the dense model
