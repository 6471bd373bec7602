"""Calibration check: agreement of the layers, neurons and experts that two halves of the calibration choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import verify_here
from safetensors.torch import save_file
from torch import Tensor

from llmprune import Recipe, run
from llmprune.anatomy.discovery import discover
from llmprune.common.errors import CalibrationError
from llmprune.cut.decision import Cut
from llmprune.results.sentences.stability import describe_agreement
from llmprune.score.stability import compare, halves
from llmprune.testing import tiny_model

MODEL = tiny_model("mixtral", num_hidden_layers=4)
ANATOMY = discover(MODEL.config)
UNIT = ANATOMY.units[0][0]
KEY = f"0.{UNIT.path}"


def cut_of(layers: tuple[int, ...], first_kept: int) -> Cut:
    """A cut that keeps half of each expert's neurons, from one on."""
    neurons_EK = torch.arange(first_kept, first_kept + UNIT.width // 2).repeat(UNIT.experts or 1, 1)
    return Cut(4, layers, {UNIT.field: UNIT.width // 2}, {KEY: neurons_EK})


def by_half(first: Cut, second: Cut) -> Callable[[Tensor], Cut]:
    """Choice of the first cut by even windows and of the second by odd ones."""
    return lambda numbers_N: first if int(numbers_N[0]) == 0 else second


WINDOWS = 6


def test_equal_choices_overlap_wholly() -> None:
    """Equal choices have an overlap of 1, random ones less."""
    cut = cut_of((0, 1), 0)
    found = compare(by_half(cut, cut), WINDOWS, anatomy=ANATOMY)
    assert found.layers is not None
    assert found.neurons is not None
    assert (found.layers.mean, found.layers.by_chance) == (1, 0.5)
    assert (found.neurons.mean, found.neurons.least, found.neurons.by_chance) == (1, 1, 0.5)
    assert found.experts is None


def test_overlap_counts_what_both_remove() -> None:
    """One of two removed layers is shared, and none of the neurons."""
    found = compare(by_half(cut_of((0, 1), 0), cut_of((0, 2), UNIT.width // 2)), WINDOWS, anatomy=ANATOMY)
    assert found.removed_layers == ((2, 3), (1, 3))
    assert found.layers is not None
    assert found.neurons is not None
    assert found.layers.mean == 0.5
    assert found.neurons.mean == 0


def test_halves_share_no_window_and_leave_none_out() -> None:
    """Every window is in one half; windows of sources that alternate are in both."""
    one, other = halves(5)
    assert sorted([*one.tolist(), *other.tolist()]) == [0, 1, 2, 3, 4]


def _recipe(folder: Path, samples: int, depth: dict[str, object]) -> Recipe:
    tiny_model("llama", num_hidden_layers=4).save_pretrained(folder / "model")
    save_file({"t": torch.randint(0, 60, (samples, 16))}, folder / "tokens.safetensors")
    tokens = {"tokens": str(folder / "tokens.safetensors"), "key": "t", "self_generated": 0}
    return Recipe.model_validate({"model": {"id": str(folder / "model")}, "calibration": tokens, "depth": depth})


def test_a_calibration_without_halves_is_refused(tmp_path: Path) -> None:
    """The error comes before scoring, and names the remedy."""
    with pytest.raises(CalibrationError, match=r"and 1 of them cannot be split into halves .* leave the option out"):
        run(_recipe(tmp_path, 1, {"remove": 1}), tmp_path / "run", calibration_check=True)
    assert not (tmp_path / "run" / "scores.safetensors").exists()


def test_ablation_reads_the_same_share_of_a_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion that refits on windows of its own has some in each half."""
    verify_here(monkeypatch)
    depth = {"remove": 1, "criterion": {"kind": "residual", "windows": 8}}
    report = run(_recipe(tmp_path, 12, depth), tmp_path / "run", calibration_check=True)
    assert report.stability is not None
    assert report.stability.windows == (6, 6)
    assert report.stability.layers is not None


@pytest.mark.parametrize("depth", [{"remove": 1}, {"layers": [1]}])
def test_a_run_says_how_far_the_halves_agree(
    depth: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the option, the report has the overlaps and the sentences about them, and finished steps are reused."""
    verify_here(monkeypatch)
    MODEL.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    save_file({"t": torch.randint(0, 60, (4, 16))}, tmp_path / "tokens.safetensors")
    recipe = Recipe.model_validate(
        {
            "model": {"id": str(tmp_path / "model")},
            "calibration": {"tokens": str(tmp_path / "tokens.safetensors"), "key": "t", "self_generated": 0},
            "depth": depth,
            "experts": {"remove": 1},
        }
    )
    plain = run(recipe, tmp_path / "run")
    pages = [(tmp_path / "run" / "report.html").read_text()]
    report = run(recipe, tmp_path / "run", calibration_check=True)
    pages.append((tmp_path / "run" / "report.html").read_text())
    assert plain.stability is None
    found = report.stability
    assert found is not None
    assert found.experts is not None
    assert (found.layers is not None) == ("remove" in depth)
    assert all(0 <= part.least <= part.mean <= 1 for part in (found.layers, found.experts) if part)
    assert len(describe_agreement(found)) == 1 + ("remove" in depth)
    assert report.layers == plain.layers
    assert ["of the experts that one half" in page for page in pages] == [False, True]
