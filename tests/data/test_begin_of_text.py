"""Begin of text: the ids that a tokenizer puts in front of a text, in windows of every kind."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.shaped_tokenizers import ADDING, SHAPES, shaped_tokenizer
from helpers.tiny import tiny_tokenizer
from helpers.windows import write_rows
from safetensors.torch import save_file
from tokenizers import processors

from llmprune.common.errors import CalibrationError
from llmprune.data.begin_of_text import begin_token, begin_tokens
from llmprune.data.sources import read_documents
from llmprune.data.windows import TextWindows, fingerprint_tokens, load_windows
from llmprune.recipe.calibration import Calibration

PLAIN = [name for name in SHAPES if name not in ADDING]


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Write 60 documents of 50 to 57 digits, each of its own; return the path."""
    return write_rows(tmp_path / "numbered.jsonl", [f"{row:02d}" * 25 + "x" * (row % 8) for row in range(60)])


def loaded(name: str, **settings: Any) -> TextWindows:
    """Return windows under the tokenizer of this shape, 20 × 32 unless the settings differ."""
    return load_windows(Calibration(**settings), shaped_tokenizer(name), default_shape=(20, 32))


def in_order_of_text(windows_NL: torch.Tensor) -> torch.Tensor:
    """Return shuffled windows in the order in which they were cut, for seed 0."""
    order = torch.randperm(len(windows_NL), generator=torch.Generator().manual_seed(0))
    return windows_NL[order.argsort()]


def ids_of(name: str, *tokens: str) -> list[int]:
    """Return the ids of tokens."""
    return list(shaped_tokenizer(name).convert_tokens_to_ids(list(tokens)))


@pytest.mark.parametrize("name", SHAPES)
def test_begin_is_what_the_tokenizer_adds(name: str) -> None:
    """The begin-of-text ids are those of the post-processor; a bos token that is only defined is none."""
    tokenizer = shaped_tokenizer(name)
    expected = tuple(ids_of(name, *SHAPES[name].begins))
    assert begin_tokens(tokenizer) == expected
    assert begin_token(tokenizer) == (expected[0] if expected else None)


def test_an_end_token_is_no_begin_of_text() -> None:
    """An id that the tokenizer appends to a text does not begin one."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair=None, special_tokens=[("<|end|>", 256)]
    )
    assert tokenizer("a")["input_ids"][-1] == 256
    assert begin_token(tokenizer) is None


@pytest.mark.parametrize("documents", ["end_of_text", "blank_line", "separate"])
@pytest.mark.parametrize("name", ADDING)
def test_windows_begin_as_the_tokenizer_begins_a_text(numbered: str, name: str, documents: str) -> None:
    """Each window begins with the ids once, and so does each document after an end-of-text token, nothing else.

    No token of the text is lost or repeated.
    """
    text = loaded(name, dataset=numbered, documents=documents)
    begin, (eos,) = ids_of(name, *SHAPES[name].begins), ids_of(name, SHAPES[name].eos)
    assert text.begin == tuple(begin)
    assert text.windows_NL.shape == (20, 32)
    rows = in_order_of_text(text.windows_NL).tolist()
    for row in rows:
        assert row[: len(begin)] == begin
        starts = [place for place, token in enumerate(row) if token == begin[0]]
        if begin[0] == eos:  # the token ends a document and begins the next one
            assert all(place - before > 1 for before, place in pairwise(starts))
        else:
            assert starts == [0, *(place + 1 for place, token in enumerate(row[:-1]) if token == eos)]
    if documents == "end_of_text":
        assert max(row.count(begin[0]) for row in rows) > 1
    tokenizer = shaped_tokenizer(name)
    found = "".join(tokenizer.batch_decode(rows, skip_special_tokens=True)).replace("\n\n", "")
    read = read_documents(Calibration(dataset=numbered).text_sources()[0], tokenizer, seed=0)
    size = 32 - len(begin)
    used = [part[: len(part) // size * size] if documents == "separate" else part for part in read]
    assert "".join(used).startswith(found)
    assert len(found) > 500


@pytest.mark.parametrize("name", PLAIN)
def test_windows_of_other_tokenizers_are_the_plain_tokens(numbered: str, name: str) -> None:
    """Without a begin-of-text token, windows are the documents' tokens joined by the end-of-text token, cut in pieces.

    Their fingerprint is that of the tokens.
    """
    tokenizer, text = shaped_tokenizer(name), loaded(name, dataset=numbered)
    read = read_documents(Calibration(dataset=numbered).text_sources()[0], tokenizer, seed=0)
    stream = [token for part in read for token in [*tokenizer(part)["input_ids"], tokenizer.eos_token_id]]
    assert torch.equal(in_order_of_text(text.windows_NL), torch.tensor(stream[: 20 * 32]).view(20, 32))
    assert text.fingerprint() == fingerprint_tokens(text.windows_NL)
    assert text.begin == ()


def test_a_document_begins_once_where_its_template_begins_it(tmp_path: Path) -> None:
    """Conversations whose chat template writes the begin-of-text token have it once, also after a blank line."""
    turns = [[{"role": "user", "content": f"{row:02d}" * 8}] for row in range(40)]
    path = write_rows(tmp_path / "chats.jsonl", turns, column="messages")
    tokenizer = shaped_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    (begin,) = begin_tokens(tokenizer)
    for documents in ("end_of_text", "blank_line"):
        settings = Calibration(dataset=path, messages_field="messages", documents=documents)
        rows = load_windows(settings, tokenizer, default_shape=(20, 32)).windows_NL.tolist()
        opening = tokenizer.convert_tokens_to_ids("<")
        for row in rows:
            assert row[0] == begin
            assert all(row[place - 1] == begin for place in range(1, 32) if row[place] == opening)
            assert [begin, begin] not in [row[place : place + 2] for place in range(31)]


@pytest.mark.parametrize("length", [40, 59])
def test_a_window_counts_that_has_tokens_of_several_documents(tmp_path: Path, length: int) -> None:
    """A begin-of-text token at the end of a window is no part of the document that it announces."""
    path = write_rows(tmp_path / "equal.jsonl", [f"{row:02d}" * 28 for row in range(40)])  # 56 tokens
    text = loaded("llama3", dataset=path, sequence_length=length)
    inside = (text.windows_NL[:, 1:-1] == text.begin[0]).any(1)
    assert text.crossings == int(inside.sum())
    assert bool(text.crossings) == (length == 40)  # a window of 59 ends with the token of the next document


def test_the_recipe_decides(numbered: str) -> None:
    """``bos: false`` leaves the token out; ``true`` adds one that the tokenizer only defines, or is refused."""
    without = loaded("gemma3", dataset=numbered, bos=False)
    assert without.begin == ()
    assert not (without.windows_NL == begin_token(shaped_tokenizer("gemma3"))).any()
    (start,) = ids_of("smollm2", "<|im_start|>")
    forced = loaded("smollm2", dataset=numbered, bos=True)
    assert forced.begin == (start,)
    assert (forced.windows_NL[:, 0] == start).all()
    with pytest.raises(CalibrationError, match=r"no begin-of-text token .* set bos to auto or false"):
        loaded("qwen", dataset=numbered, bos=True)


def test_ready_tokens(tmp_path: Path) -> None:
    """Ready windows stay as they are; those that lack the token are named, and get it once by ``bos: true``."""
    (begin,) = begin_tokens(shaped_tokenizer("mistral"))
    tokens_NL = torch.arange(40, 80).view(4, 10)
    tokens_NL[1, 0] = begin
    file = {"tokens": str(tmp_path / "tokens.safetensors"), "key": "ids"}
    save_file({"ids": tokens_NL}, file["tokens"])
    as_is, forced, off = (loaded("mistral", **file, bos=bos) for bos in ("auto", True, False))
    assert torch.equal(as_is.windows_NL, tokens_NL)
    assert torch.equal(off.windows_NL, tokens_NL)
    assert [text.lacking for text in (as_is, forced, off)] == [(begin,), (), ()]
    assert [text.begin for text in (as_is, forced, off)] == [(begin,), (begin,), ()]
    assert as_is.fingerprint() != off.fingerprint()
    expected_NL = torch.cat([torch.full((4, 1), begin), tokens_NL[:, :-1]], 1)
    expected_NL[1] = tokens_NL[1]
    assert torch.equal(forced.windows_NL, expected_NL)
    save_file({"ids": forced.windows_NL}, file["tokens"])
    for bos in ("auto", True):
        again = loaded("mistral", **file, bos=bos)
        assert torch.equal(again.windows_NL, forced.windows_NL)
        assert again.lacking == ()
