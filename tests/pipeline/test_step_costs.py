"""Costs of steps: the wait for layers to be read is recorded, and a long one is a warning."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.devices import simulated_devices

from llmprune.layerwise.disk_waits import DiskWaits
from llmprune.pipeline.step_costs import measure_step, warn_of_slow_disk
from llmprune.results.figures.provenance import Step


def test_a_slow_disk_is_a_warning() -> None:
    """A step that waited for more than 30 % of its time is named with both times; short waits are not worth it."""
    steps = [
        Step(name="pass 1", seconds=100, reused=False, seconds_waited=41.4),
        Step(name="pass 2", seconds=100, reused=False, seconds_waited=29.0),
        Step(name="ablation", seconds=8, reused=False, seconds_waited=7.0),
        Step(name="saving", seconds=100, reused=False),
    ]
    (warning,) = warn_of_slow_disk(steps)
    assert warning.startswith("pass 1 waited 41 s of 100 s for layers to be read")


def test_a_step_records_the_wait_of_its_own() -> None:
    """Only what the decoder waited during the step counts; a step without a decoder has no such figure."""
    steps: list[Step] = []
    decoder: Any = SimpleNamespace(waits=DiskWaits())
    decoder.waits.add(5.0)
    with measure_step(steps, "pass 1", decoder=decoder):
        decoder.waits.add(2.5)
    with measure_step(steps, "saving"):
        pass
    assert [step.seconds_waited for step in steps] == [2.5, None]


def test_a_slow_disk_is_said_while_the_step_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Once a step, as soon as it has waited for long; waits before the step do not count."""
    decoder: Any = SimpleNamespace(waits=DiskWaits())
    decoder.waits.add(90.0)
    with caplog.at_level(logging.WARNING, logger="llmprune"), measure_step([], "pass 1", decoder=decoder):
        decoder.waits.add(4.0)
        assert not caplog.records
        decoder.waits.add(8.0)
        decoder.waits.add(8.0)
        (warning,) = caplog.messages
    assert warning.startswith("pass 1 has waited 12 of its 0 s for layers to be read")


def test_the_peak_is_that_of_the_fullest_gpu() -> None:
    """A model may be split over several; a later step does not count what an earlier one has freed."""
    steps: list[Step] = []
    with simulated_devices(2):
        for place, numbers in ((1, 1000), (0, 500)):
            with measure_step(steps, "pass 1"):
                torch.ones(numbers, device=f"cuda:{place}")
    with measure_step(steps, "saving"):
        pass
    assert [step.peak_device for step in steps] == [4000, 2000, None]
