"""Windows for the training after the cut: none that calibration or perplexity see, and too little text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_tokenizer
from helpers.windows import write_rows
from safetensors.torch import save_file

from llmprune.common.errors import CalibrationError
from llmprune.data.recovery_text import RecoverySources, UsedText, load_recovery_text
from llmprune.data.recovery_windows import Part, arrange
from llmprune.data.windows import load_windows
from llmprune.recipe import recover
from llmprune.recipe.calibration import Calibration, TokenWindows


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Write 60 documents of numbers of different lengths, each number once in the whole file; return the path."""
    rows = ["".join(f"{100 * row + place:06d}," for place in range(10 + row % 7)) for row in range(60)]
    return write_rows(tmp_path / "numbered.jsonl", rows)


def _used(**settings: Any) -> UsedText:
    windows = TokenWindows.model_validate(settings)
    shape = windows.samples or 4, windows.sequence_length or 16
    return UsedText(windows, load_windows(windows, tiny_tokenizer(), default_shape=shape))


def _rest(
    calibration: dict[str, Any], *others: UsedText, amounts: tuple[int, int], data: dict[str, Any] | None = None
) -> RecoverySources:
    """Return the recovery's text of a calibration, by default its sources."""
    settings = Calibration.model_validate(calibration | {"self_generated": 0})
    text = load_windows(settings, tiny_tokenizer(), default_shape=settings.read_shape())
    windows = recover.RecoveryText.model_validate(data or {}).resolved(settings)
    used = (UsedText(settings, text), *others)
    return load_recovery_text(
        windows, tiny_tokenizer(), number=amounts[0], settings=_holding_out(amounts[1]), used=used
    )


def _holding_out(windows: int) -> recover.Recover:
    return recover.Recover(tokens=1000, held_out=windows)


def _all(text: RecoverySources) -> list[tuple[int, ...]]:
    parts = [part for source in text.sources for part in (source.held_out_HL, source.train_NL)]
    return [tuple(row) for row in torch.cat(parts).tolist()]


def _numbers(rows: Any) -> set[str]:
    texts = tiny_tokenizer().batch_decode(rows)
    return {number for text in texts for number in text.replace("<|end|>", ",").split(",") if len(number) == 6}


@pytest.mark.parametrize("documents", ["end_of_text", "blank_line", "separate"])
def test_the_text_goes_on_where_the_calibration_ends(numbered: str, documents: str) -> None:
    """More windows of the same packing, without the calibration's, are the windows of the training, in their order."""
    settings = {"dataset": numbered, "sequence_length": 32, "documents": documents}
    more = _used(**settings, samples=37).text.parts[0].windows_NL
    text = _rest(settings | {"samples": 13}, amounts=(20, 4))
    assert _all(text) == [tuple(row) for row in more[13:].tolist()]
    assert [len(source.held_out_HL) for source in text.sources] == [4]


def test_windows_of_another_length_follow_too(numbered: str) -> None:
    """No number of the calibration's text is in a window of the training, whose length differs."""
    settings = {"dataset": numbered, "samples": 13, "sequence_length": 32}
    text = _rest(settings, amounts=(9, 1), data={"sequence_length": 50})
    seen = _numbers(_used(**settings).text.windows_NL)
    assert len(seen) > 40
    assert not seen & _numbers(_all(text))


@pytest.mark.parametrize("seed", [0, 5])
def test_perplexity_is_not_trained_on(numbered: str, seed: int) -> None:
    """Text of the same file that perplexity reads, in this order or another, is in no window of the training."""
    held_out = _used(dataset=numbered, samples=24, sequence_length=32, seed=seed)
    text = _rest({"dataset": numbered, "samples": 8, "sequence_length": 32}, held_out, amounts=(500, 2))
    assert not _numbers(held_out.text.windows_NL) & _numbers(_all(text))
    assert len(_all(text)) > 50


def test_ready_tokens_go_on_after_those_of_the_calibration(tmp_path: Path) -> None:
    """Rows of the file that follow the calibration's samples are trained on; rows that equal one of these are not."""
    rows = torch.arange(80).view(10, 8)
    rows[9] = rows[0]
    save_file({"ids": rows}, tmp_path / "ids.safetensors")
    calibration = {"tokens": str(tmp_path / "ids.safetensors"), "key": "ids", "samples": 4}
    text = _rest(calibration, amounts=(20, 1))
    assert _all(text) == [tuple(row) for row in rows[4:9].tolist()]
    with pytest.raises(CalibrationError, match=r"recover\.data: no data is left .* they hold 80 tokens"):
        _rest(calibration | {"samples": None}, amounts=(20, 1))


def test_a_short_source_gives_what_it_has(tmp_path: Path) -> None:
    """The others fill up by weight; a source that the calibration used up is left out, and notes say both."""
    sources = [
        {"dataset": write_rows(tmp_path / f"{letter}.jsonl", [f"{letter}{row:05d}" * 21 for row in range(number)])}
        for letter, number in (("a", 40), ("b", 3), ("c", 40), ("d", 1))
    ]
    sources[2]["weight"] = 3
    calibration = {"dataset": str(sources[3]["dataset"]), "samples": 3, "sequence_length": 32}
    text = _rest(calibration, amounts=(60, 2), data={"sources": sources})
    counts = {Path(source.name).stem: len(source.train_NL) for source in text.sources}
    assert counts["b"] == 9  # 3 documents of 127 tokens are 11 windows, 2 of them held out
    assert counts["c"] > 2.5 * counts["a"]
    assert sum(counts.values()) >= 60
    assert any("d.jsonl has no window" in note for note in text.notes)


def test_text_that_is_used_up_is_repeated(numbered: str) -> None:
    """Every window is trained on equally often, each epoch in another order, and a note says how often."""
    settings = {"dataset": numbered, "samples": 8, "sequence_length": 32}
    text = _rest(settings, amounts=(1000, 4))
    windows = arrange(text, None, number=1000, settings=_holding_out(4), seed=3)
    number = len(windows.train_NL)
    assert number < 300
    assert len(windows.order_M) == 1000
    assert windows.order_M[:number].tolist() == list(range(number))
    assert sorted(windows.order_M[number : 2 * number].tolist()) == list(range(number))
    assert windows.order_M[number : 2 * number].tolist() != list(range(number))
    assert any("more than 4 times" in note for note in windows.notes)
    again = arrange(text, None, number=1000, settings=_holding_out(4), seed=3)
    assert torch.equal(again.order_M, windows.order_M)
    assert torch.equal(again.train_NL, windows.train_NL)


def test_the_models_own_windows_are_a_source(numbered: str) -> None:
    """They are mixed with the text, and some of them are held out."""
    text = _rest({"dataset": numbered, "samples": 8, "sequence_length": 32}, amounts=(20, 4))
    windows = arrange(text, torch.full((10, 32), 7), number=27, settings=_holding_out(4), seed=0)
    assert windows.names == (numbered, "self_generated")
    assert torch.equal((windows.train_NL == 7).all(1), windows.train_sources_N == 1)
    assert windows.train_sources_N.bincount().tolist() == [20, 7]
    assert windows.held_out_sources_N.bincount().tolist() == [4, 3]
    assert torch.equal((windows.held_out_NL == 7).all(1), windows.held_out_sources_N == 1)


def test_trainings_that_follow_each_other_read_on(numbered: str) -> None:
    """Three parts have the windows of the whole, in its order, and the same held-out windows; repeats are of each."""
    text = _rest({"dataset": numbered, "samples": 4, "sequence_length": 16}, amounts=(12, 2))
    whole = arrange(text, None, number=30, settings=_holding_out(2), seed=0)
    parts = [whole.part(Part(number, 3)) for number in (1, 2, 3)]
    taken = [part.train_NL[part.order_M] for part in parts]
    assert torch.equal(torch.cat(taken), whole.train_NL[whole.order_M])
    assert all(torch.equal(part.held_out_NL, whole.held_out_NL) for part in parts)
    first = {tuple(row) for row in taken[0].tolist()}
    assert len(first) == len(parts[0].train_NL) == 10
    assert whole.part(Part()) is whole
