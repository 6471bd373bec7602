"""Files of ready tokens: read unchanged or cut, and refused where they hold no token windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.windows import load
from safetensors.torch import save_file

from llmprune.common.errors import CalibrationError


def test_ready_tokens(tmp_path: Path) -> None:
    """Ready windows are returned unchanged, or cut to the samples and the length of the recipe."""
    tokens_NL = torch.arange(60, dtype=torch.int32).view(6, 10)
    file = str(tmp_path / "tokens.safetensors")
    save_file({"calibration": tokens_NL}, file)
    assert torch.equal(load(tokens=file, key="calibration"), tokens_NL.to(torch.int64))
    cut_NL = load(tokens=file, key="calibration", samples=2, sequence_length=8)
    assert torch.equal(cut_NL, tokens_NL[:2, :8].to(torch.int64))


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
