"""Inputs and environment of a run, and the cost of its steps."""

from __future__ import annotations

from pydantic import Field

from llmprune.results.figures.base import Figures
from llmprune.results.figures.calibration import CalibrationSource


class Step(Figures):
    """Cost of one step of the run."""

    name: str
    seconds: float  # of the computation, also if an earlier run did it
    reused: bool  # an earlier run's product was still valid
    estimated_seconds: float | None = None  # by the plan, for the device and processes of the run; None if unknown
    tokens_per_second: float | None = None  # calibration tokens, if the step runs the model on them
    seconds_waited: float | None = None  # for layers to be read from the disk, in steps that run them
    bytes_read: int | None = None  # from disk, without reads from the page cache
    peak_resident: int | None = None  # bytes of memory, mapped files included
    peak_device: int | None = None  # bytes on the GPU where they are most
    forward_ratio: float | None = None  # seconds / seconds of a plain forward pass, with --measure-forward


class Provenance(Figures):
    """Inputs and environment of the run."""

    model: str
    adapter_base: str | None = None  # that the model, an adapter, was merged into
    revision: str | None
    commit: str | None
    quantization: str | None = None  # of the base's weights, which were dequantized
    calibration_fingerprint: str | None
    calibration_tokens: int | None
    calibration_crossings: int | None = None  # windows with parts of several documents; None for ready-made tokens
    calibration_sources: tuple[CalibrationSource, ...] = ()
    begin_of_text: str | None = None  # that the calibration windows begin with, as ``<bos> (2)``
    datasets: dict[str, str] = Field({})  # commit of each hub dataset that was read
    seed: int
    trust_remote_code: bool
    device: str
    processes: int
    batch_size: int | None = None  # calibration windows that a layer processed at a time
    versions: dict[str, str]
