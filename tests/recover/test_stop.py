"""Ctrl-C in a training: what it says, and the two ways on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from helpers.recovering import recovery

from llmprune.common.errors import OutputError, TrainingStopped


def stop_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C be pressed in a step of the optimiser, counted from 1."""
    step, made = torch.optim.AdamW.step, 0

    def press(self: torch.optim.AdamW, closure: None = None) -> None:
        nonlocal made
        made += 1
        if made == number:
            signal.raise_signal(signal.SIGINT)
        step(self, closure)

    patch.setattr(torch.optim.AdamW, "step", press)


def test_a_stopped_training_ends_with_its_best_weights(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step under way is made, the message says how far it is; the training can be ended there."""
    with monkeypatch.context() as patch:
        stop_in_step(3, patch)
        with pytest.raises(TrainingStopped, match=r"^stopped at step 4 of 6, best so far step [24]$"):
            recovery(pair, tmp_path).run()
    found = recovery(pair, tmp_path, end=True).run()
    assert found.ended
    assert found.folder is not None
    assert 0 < found.progress.best_step <= found.progress.step < found.course.steps


def test_nothing_is_ended_that_was_not_begun(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The message names the option."""
    with pytest.raises(OutputError, match="--end-recovery takes the best weights of a training, and none was begun"):
        recovery(pair, tmp_path, end=True).run()
