"""The second loss: the student's hidden states are trained towards those of the dense model."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.recovering import matching, random_windows, recovery

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recover import Recover
from llmprune.recover.arithmetic import Arithmetic
from llmprune.recover.beside import DenseBeside, layers_after
from llmprune.recover.student import Student


def distance(dense: Path, folder: Path) -> float:
    """Return the mean relative squared error of a saved model's hidden states."""
    arithmetic = Arithmetic.here("float32")
    student = Student(open_decoder(ModelSource(id=str(folder))), Recover(tokens=1), arithmetic=arithmetic)
    beside = DenseBeside(matching(dense, 1.0), arithmetic=arithmetic, sharding=student.sharding)
    with torch.no_grad(), beside.compared(student.layers, random_windows().held_out_NL) as errors:
        student.logits(random_windows().held_out_NL)
    return float(beside.loss(errors))


def test_hidden_states_come_nearer_to_the_dense_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """On text that was held out they are nearer than without the second loss; the dense model's own are equal."""
    found = [recovery(pair, tmp_path / str(weight), hidden_states=weight).run().folder for weight in (0.0, 10.0)]
    without, after = (distance(pair[0], folder) for folder in found if folder is not None)
    assert after < without < distance(pair[0], pair[1])
    assert distance(pair[0], pair[0]) == 0


def test_each_kept_layer_is_compared_after_the_removed_ones_behind_it() -> None:
    """The last kept layer is compared after the last layer of the dense model."""
    assert layers_after((0, 1, 4, 5), 8) == (0, 3, 4, 7)
    assert layers_after((0, 1, 2), 3) == (0, 1, 2)
