"""Token windows of text: packing, shuffling, mixing of sources, and texts that are too short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_tokenizer
from helpers.windows import decoded, load, write_rows

from llmprune.common.errors import CalibrationError
from llmprune.data.window_sources import source_names, sources_of_windows, with_generated
from llmprune.data.windows import fingerprint_tokens, load_windows
from llmprune.recipe.calibration import Calibration


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Write 200 documents of numbers, each number once in the whole file; return the path."""
    rows = ["".join(f"{20 * row + place:06d}," for place in range(20)) for row in range(200)]
    return write_rows(tmp_path / "numbered.jsonl", rows)


def test_windows_never_overlap(numbered: str) -> None:
    """A number that is in the text once is in the windows at most once; the shape is samples × length."""
    windows_NL = load(dataset=numbered, samples=50, sequence_length=64)
    assert windows_NL.shape == (50, 64)
    assert windows_NL.dtype == torch.int64
    numbers = re.findall(r"\d{6}(?=,)", "\n".join(decoded(windows_NL)))
    assert len(numbers) > 300
    assert len(set(numbers)) == len(numbers)


def test_documents_are_joined_with_the_end_of_text_token(numbered: str) -> None:
    """Two documents are separated by the tokenizer's end-of-text token, and by no other special token."""
    windows_NL = load(dataset=numbered, samples=8, sequence_length=141)
    assert (windows_NL == 256).sum(1).tolist() == [1] * 8  # a document is 140 bytes


def test_documents_can_be_joined_by_a_blank_line(numbered: str) -> None:
    """With a blank line as separator, no special token is in the windows."""
    windows_NL = load(dataset=numbered, samples=8, sequence_length=142, documents="blank_line")
    assert not (windows_NL == 256).any()
    assert all("\n\n" in text for text in decoded(windows_NL))


@pytest.mark.parametrize(
    ("length", "documents", "crossings"),
    [(141, "end_of_text", 0), (100, "end_of_text", 7), (142, "blank_line", 0), (70, "separate", 0)],
)
def test_windows_with_parts_of_several_documents_are_counted(
    numbered: str, length: int, documents: str, crossings: int
) -> None:
    """A window counts if it holds parts of two documents. A document is 140 tokens and the separator."""
    settings = Calibration(dataset=numbered, samples=10, sequence_length=length, documents=documents)
    loaded = load_windows(settings, tiny_tokenizer(), default_shape=(4, 16))
    assert loaded.crossings == crossings
    if documents == "separate":
        texts = decoded(loaded.windows_NL)
        assert all(text[:6].isdigit() for text in texts)
        assert {text.count(",") for text in texts} == {10}


def test_separate_windows_hold_one_document_each(tmp_path: Path) -> None:
    """Documents shorter than a window are left out, which the error states where too few remain."""
    path = write_rows(tmp_path / "mixed.jsonl", ["a" * 40, "b" * 8, "c" * 33])
    windows_NL = load(dataset=path, samples=4, sequence_length=16, documents="separate")
    assert sorted(decoded(windows_NL)) == ["a" * 16] * 2 + ["c" * 16] * 2
    with pytest.raises(CalibrationError, match="windows of one document each"):
        load(dataset=path, samples=5, sequence_length=16, documents="separate")


def test_seed_decides(numbered: str) -> None:
    """Equal seeds give equal windows, and another seed gives others."""
    first, again, other = (load(dataset=numbered, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert fingerprint_tokens(first) == fingerprint_tokens(again)
    assert fingerprint_tokens(first) != fingerprint_tokens(other)


def test_fingerprint_depends_on_the_shape() -> None:
    """Equal tokens in windows of another shape have another fingerprint."""
    tokens = torch.arange(16)
    assert fingerprint_tokens(tokens.view(2, 8)) != fingerprint_tokens(tokens.view(4, 4))


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    """A source of weight 3 gives three times the windows of a source of weight 1, in mixed order."""
    sources = [
        {"dataset": write_rows(tmp_path / f"{letter}.jsonl", [letter * 63] * 50), "weight": weight}
        for letter, weight in (("a", 3), ("b", 1))
    ]
    letters = [text[0] for text in decoded(load(sources=sources, samples=32, sequence_length=64))]
    assert letters.count("a") == 24
    assert letters.count("b") == 8
    assert letters != sorted(letters)


def test_a_source_without_a_window_is_an_error(tmp_path: Path) -> None:
    """A source whose weight is too small for one window is an error."""
    sources = [
        {"dataset": write_rows(tmp_path / f"{letter}.jsonl", [letter] * 50), "weight": weight}
        for letter, weight in (("a", 100), ("b", 1))
    ]
    with pytest.raises(CalibrationError, match=r"b\.jsonl would get none of the 4 samples; ask for more"):
        load(sources=sources)


def test_streamed_rows_are_shuffled_by_the_seed(tmp_path: Path, numbered: str) -> None:
    """A folder is streamed like a hub data set, and its rows are shuffled by the seed."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    Path(numbered).rename(folder / "train.jsonl")
    first, again, other = (load(dataset=str(folder), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_window_knows_its_source(tmp_path: Path) -> None:
    """Sources follow the windows into the mixed order, and have the names that the recipe gives them."""
    sources = [
        {"dataset": write_rows(tmp_path / f"{letter}.jsonl", [letter * 31] * 50), "name": name}
        for letter, name in (("a", "first"), ("b", None))
    ]
    settings = Calibration.model_validate(
        {"sources": sources, "samples": 8, "sequence_length": 32, "self_generated": 0}
    )
    loaded = load_windows(settings, tiny_tokenizer(), default_shape=settings.read_shape())
    sources_N = sources_of_windows(settings)
    assert sources_N is not None
    assert [text[0] for text in decoded(loaded.windows_NL)] == ["ab"[source] for source in sources_N]
    assert source_names(settings) == ("first", str(tmp_path / "b.jsonl"))
    assert loaded.documents == (4, 4)


def test_sources_of_one_data_set_have_distinct_names() -> None:
    """A name says what tells its source from the others of the same data set or name."""
    wiki = {"dataset": "org/wiki"}
    sources = [
        wiki | {"config": "de"}, wiki | {"config": "fr"}, wiki, {"dataset": "org/web"},
        {"dataset": "org/a", "name": "code"}, {"dataset": "org/b", "name": "code"},
    ]  # fmt: skip
    settings = Calibration.model_validate({"sources": sources, "samples": 8, "self_generated": 0})
    assert source_names(settings) == (
        "org/wiki (config de)", "org/wiki (config fr)", "org/wiki", "org/web", "code (number 5)", "code (number 6)",
    )  # fmt: skip


def test_windows_of_the_model_itself_are_a_source(numbered: str) -> None:
    """The model's own windows come in addition to the samples, in shuffled order, as the last source."""
    settings = Calibration(dataset=numbered, samples=10, sequence_length=32, self_generated=4)
    read_NL = load_windows(settings, tiny_tokenizer(), default_shape=settings.read_shape()).windows_NL
    assert (len(read_NL), settings.shape()) == (10, (14, 32))
    windows_NL = with_generated(read_NL, torch.full((4, 32), 7), seed=settings.seed)
    sources_N = sources_of_windows(settings)
    assert sources_N is not None
    assert torch.equal((windows_NL == 7).all(1), sources_N == 1)
    assert sources_N[-4:].sum() < 4
    assert source_names(settings) == (numbered, "self_generated")
