"""Result of ``llmprune bench``: two models timed on one machine."""

from __future__ import annotations

from llmprune.results.figures.base import SCHEMA_VERSION, Figures


class Spread(Figures):
    """Median with both quartiles; with fewer than four values, minimum and maximum take the quartiles' place."""

    median: float
    low: float
    high: float


class Pair(Figures):
    """One figure of both models, and the ratio model / base over the pairs of runs."""

    base: Spread
    model: Spread
    ratio: Spread


class BenchPoint(Figures):
    """Times and peak memory for one batch size and one context length."""

    batch_size: int
    context: int  # tokens of each prompt
    first_token: Pair  # seconds from the call to the first new token
    prefill: Pair  # prompt tokens per second
    decode: Pair  # new tokens per second after the first
    peak: tuple[int, int]  # base, model: peak bytes during generation in addition to the loaded models


class BenchSize(Figures):
    """Size of one model, in memory and on disk."""

    parameters: int
    weights: int  # bytes in memory, in the dtype of the measurement
    disk: int | None  # bytes of the weight files; None if they are not in a folder
    kv_bytes_per_token: int | None
    decoded_bytes: int  # bytes of weights that one decoded token reads; all experts of a mixture are counted
    joules: float  # estimated DRAM energy of reading decoded_bytes, at 640 pJ per 32-bit word


class SparseProduct(Figures):
    """Time of one matrix shape, multiplied with a dense and with a 2:4 kernel."""

    outputs: int
    inputs: int
    matrices: int  # matrices of this shape in the model
    tokens: int
    dense: float  # milliseconds
    sparse: float  # milliseconds
    difference: float  # largest difference of the outputs, relative to the largest output


class BenchFigures(Figures):
    """Comparison of two models that were timed alternately on one machine."""

    schema_version: int = SCHEMA_VERSION
    base: str
    model: str
    base_size: BenchSize
    model_size: BenchSize
    points: tuple[BenchPoint, ...]
    products: tuple[SparseProduct, ...] = ()  # with --sparse
    repeats: int
    new_tokens: int
    cache: str  # "dynamic" or "static"
    device: str
    dtype: str
