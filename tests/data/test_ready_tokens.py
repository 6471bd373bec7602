"""Files of ready tokens: read unchanged or cut, and refused where they hold no token windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.windows import load
from safetensors.torch import save_file

from llmprune.common.errors import CalibrationError
from llmprune.data.window_sources import source_names, sources_of_windows
from llmprune.recipe.calibration import Calibration


def test_ready_tokens(tmp_path: Path) -> None:
    """Ready windows are returned unchanged, or cut to the samples and the length of the recipe."""
    tokens_NL = torch.arange(60, dtype=torch.int32).view(6, 10)
    file = str(tmp_path / "tokens.safetensors")
    save_file({"calibration": tokens_NL}, file)
    assert torch.equal(load(tokens=file, key="calibration"), tokens_NL.to(torch.int64))
    cut_NL = load(tokens=file, key="calibration", samples=2, sequence_length=8)
    assert torch.equal(cut_NL, tokens_NL[:2, :8].to(torch.int64))


def test_ready_tokens_with_sources(tmp_path: Path) -> None:
    """A tensor beside the windows numbers their sources, which count from zero and keep their numbers as names."""
    file = str(tmp_path / "tokens.safetensors")
    save_file({"windows": torch.arange(60).view(6, 10), "kinds": torch.tensor([5, 2, 5, 2, 9, 9])}, file)
    settings = Calibration(tokens=file, key="windows", source_key="kinds", self_generated=0)
    assert len(load(tokens=file, key="windows", source_key="kinds")) == 6
    sources_N = sources_of_windows(settings)
    assert sources_N is not None
    assert sources_N.tolist() == [1, 0, 1, 0, 2, 2]
    assert source_names(settings) == ("2", "5", "9")
    fewer = settings.model_copy(update={"samples": 4})
    assert Calibration(**settings.model_dump(exclude_unset=True), combine="worst").scored_sources == 3
    assert (fewer.number_of_sources(), source_names(fewer)) == (2, ("2", "5"))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"'kinds' in .* is torch.int64 \[5\]; .* integers \[6\]"),
        (torch.zeros(6), r"is torch.float32 \[6\]; the sources of the windows are integers"),
        (torch.zeros(6, 1, dtype=torch.int64), r"is torch.int64 \[6, 1\]"),
        (torch.zeros(0, dtype=torch.int64), r"is torch.int64 \[0\]"),
        (torch.full((6,), 2**63, dtype=torch.uint64), r"is torch.uint64 \[6\]"),
        (None, "has no tensor 'kinds'.*; set source_key to one of: windows"),
    ],
)
def test_sources_that_do_not_fit_the_windows(tmp_path: Path, kinds: torch.Tensor | None, message: str) -> None:
    """Sources that are not one whole number for each window are an error of loading, and none of planning."""
    tensors = {"windows": torch.arange(60).view(6, 10)} | ({} if kinds is None else {"kinds": kinds})
    file = str(tmp_path / "tokens.safetensors")
    save_file(tensors, file)
    settings = Calibration(tokens=file, key="windows", source_key="kinds")
    assert len(source_names(settings)) == settings.number_of_sources()
    sources_of_windows(settings)
    with pytest.raises(CalibrationError, match=message):
        load(tokens=file, key="windows", source_key="kinds")


BAD_TENSORS = {
    "float": (torch.rand(2, 8), "float32", "integers"),
    "bool": (torch.ones(2, 8, dtype=torch.bool), "bool", "integers"),
    "flat": (torch.arange(8), "[8]", "[N, L]"),
    "empty": (torch.zeros(0, 8, dtype=torch.int64), "[0, 8]", "at least one window"),
    "padded": (torch.full((2, 8), -100), "-100", "leave no padding"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_token_tensors(tmp_path: Path, name: str) -> None:
    """A tensor of another kind is reported with its name, type and shape, and the kind that is needed."""
    tensor, *message = BAD_TENSORS[name]
    save_file({name: tensor}, tmp_path / "tokens.safetensors")
    with pytest.raises(CalibrationError) as caught:
        load(tokens=str(tmp_path / "tokens.safetensors"), key=name)
    assert all(part in str(caught.value) for part in [repr(name), *message])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": "calib"}, ["no tensor 'calib'", "did you mean 'calibration'", "set key to"]),
        ({"samples": 7}, ["[6, 10]", "7 × 10", "lower samples"]),
        ({"sequence_length": 11}, ["[6, 10]", "6 × 11", "sequence_length"]),
        ({"tokens": "absent.safetensors"}, ["absent.safetensors", "cannot be read"]),
        (
            {"tokens": "damaged.safetensors"},
            ["damaged.safetensors", "cannot be read", "give a safetensors file"],
        ),
    ],
)
def test_unusable_token_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: list[str]
) -> None:
    """A missing tensor, a missing file and a small tensor are reported with value, limit and remedy."""
    monkeypatch.chdir(tmp_path)
    save_file({"calibration": torch.arange(60).view(6, 10)}, "good.safetensors")
    Path("damaged.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(CalibrationError) as caught:
        load(**{"tokens": "good.safetensors", "key": "calibration", **settings})
    assert all(part in str(caught.value) for part in message), str(caught.value)
