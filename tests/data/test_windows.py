"""Token windows: where the text comes from, what each window holds, and every way it can be too little."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers.tiny import tiny_tokenizer
from safetensors.torch import save_file

from llmprune.common.errors import CalibrationError
from llmprune.data.sources import load_text, read_documents
from llmprune.data.windows import fingerprint_tokens, load_windows
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.text_source import TextSource

TOPICS = "package://pydoc_data.topics/topics"
CHAT = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]


@pytest.fixture(autouse=True)
def _cache_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(chat: bool = True, **settings: Any) -> torch.Tensor:
    """Windows under the tiny tokenizer, 4 × 16 unless the settings say otherwise."""
    return load_windows(Calibration(**settings), tiny_tokenizer(chat), default_shape=(4, 16))[0]


def decoded(windows_NL: torch.Tensor) -> list[str]:
    """The text of each window."""
    return tiny_tokenizer().batch_decode(windows_NL)


def write_rows(path: Path, rows: list[Any], column: str = "text") -> str:
    """JSON lines with one column, and the path of the file."""
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """200 documents of numbers, each number once in the whole file."""
    rows = ["".join(f"{20 * row + place:06d}," for place in range(20)) for row in range(200)]
    return write_rows(tmp_path / "numbered.jsonl", rows)


def test_windows_never_overlap(numbered: str) -> None:
    """A number that is in the text once is in the windows at most once, and samples × length is honoured."""
    windows_NL = load(dataset=numbered, samples=50, sequence_length=64)
    assert windows_NL.shape == (50, 64)
    assert windows_NL.dtype == torch.int64
    numbers = re.findall(r"\d{6}(?=,)", "\n".join(decoded(windows_NL)))
    assert len(numbers) > 300
    assert len(set(numbers)) == len(numbers)


def test_documents_are_joined_with_the_end_of_text_token(numbered: str) -> None:
    """Between two documents stands the tokenizer's end-of-text token, and no other special token."""
    windows_NL = load(dataset=numbered, samples=8, sequence_length=141)
    assert (windows_NL == 256).sum(1).tolist() == [1] * 8  # a document is 140 bytes


def test_documents_can_be_joined_by_a_blank_line(numbered: str) -> None:
    """Then no special token is in the windows, and the text reads on."""
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
    """A document is 140 tokens and what follows it: a window that ends with its own document crosses nothing."""
    settings = Calibration(dataset=numbered, samples=10, sequence_length=length, documents=documents)
    windows_NL, found = load_windows(settings, tiny_tokenizer(), default_shape=(4, 16))
    assert found == crossings
    whole = [text.count(",") for text in decoded(windows_NL)]
    if documents == "separate":
        assert all(text[:6].isdigit() for text in decoded(windows_NL))
        assert set(whole) == {10}


def test_separate_windows_hold_one_document_each(tmp_path: Path) -> None:
    """Documents shorter than a window are left out, and where too few remain the error says so."""
    path = write_rows(tmp_path / "mixed.jsonl", ["a" * 40, "b" * 8, "c" * 33])
    windows_NL = load(dataset=path, samples=4, sequence_length=16, documents="separate")
    assert sorted(decoded(windows_NL)) == ["a" * 16] * 2 + ["c" * 16] * 2
    with pytest.raises(CalibrationError, match="windows of one document each"):
        load(dataset=path, samples=5, sequence_length=16, documents="separate")


def test_seed_decides(numbered: str) -> None:
    """The same seed gives the same windows, and another seed gives others."""
    first, again, other = (load(dataset=numbered, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert fingerprint_tokens(first) == fingerprint_tokens(again)
    assert fingerprint_tokens(first) != fingerprint_tokens(other)


def test_fingerprint_sees_the_shape() -> None:
    """The same tokens cut into other windows have another fingerprint."""
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
    """A source so light that it would get no window stops the run instead of vanishing."""
    sources = [
        {"dataset": write_rows(tmp_path / f"{letter}.jsonl", [letter] * 50), "weight": weight}
        for letter, weight in (("a", 100), ("b", 1))
    ]
    with pytest.raises(CalibrationError, match=r"b\.jsonl would get none of the 4 samples; ask for more"):
        load(sources=sources)


def test_messages_are_rendered_with_the_chat_template(tmp_path: Path) -> None:
    """A column of messages becomes the text that the model's chat template makes of it."""
    windows_NL = load(
        dataset=write_rows(tmp_path / "chat.jsonl", [CHAT] * 20, "messages"),
        messages_field="messages",
        samples=1,
        sequence_length=40,
    )
    assert decoded(windows_NL)[0].startswith("<user>two plus two?\n<assistant>four\n<|end|>")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_local_files(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Text, JSON lines and parquet files are read, without a word on the screen when nobody watches."""
    path = tmp_path / f"data[1]{suffix}"
    texts = [f"document number {index}" for index in range(30)]
    if suffix == ".txt":
        path.write_text("\n\n".join(texts))
    elif suffix == ".parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
        capfd.readouterr()
    else:
        write_rows(path, texts)
    assert "document number" in " ".join(decoded(load(dataset=str(path), sequence_length=32)))
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """The cache of the datasets library never answers for a file that was edited since."""
    path = tmp_path / "data.jsonl"
    for letter in "ab":
        write_rows(path, [letter * 100] * 9)
        assert decoded(load(dataset=str(path)))[0][0] == letter


def test_package_text_and_its_split() -> None:
    """Python's own documentation is readable, and train[:80%] shares no row with train[80%:]."""
    rows = {
        split: list(load_text(TextSource(dataset=TOPICS, split=split))["text"])
        for split in ("train", "train[:80%]", "train[80%:]")
    }
    assert rows["train"] == rows["train[:80%]"] + rows["train[80%:]"]
    assert not set(rows["train[:80%]"]) & set(rows["train[80%:]"])
    assert load(dataset=TOPICS, split="train[:80%]", samples=64, sequence_length=256).shape == (64, 256)


@pytest.mark.parametrize(("split", "streaming"), [("train", True), ("train[:10%]", False), ("a+b", False)])
def test_hub_data_is_streamed_unless_sliced(split: str, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of hundreds of gigabytes is read only as far as needed; a slice needs all of it."""
    asked: dict[str, Any] = {}

    def load_dataset(*names: str, **options: Any) -> datasets.Dataset:
        asked.update(options, names=names)
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("llmprune.data.sources.require_own_data", lambda *_, **__: None)
    monkeypatch.setattr("llmprune.data.sources.resolve_revision", lambda *_, **__: SimpleNamespace(resolved="c0ffee"))
    load_text(TextSource(dataset="allenai/c4", config="en", split=split))
    assert asked == {"names": ("allenai/c4", "en"), "split": split, "revision": "c0ffee", "streaming": streaming}


def test_streamed_rows_are_shuffled_by_the_seed(tmp_path: Path, numbered: str) -> None:
    """A folder is read like a hub data set, as a stream, and the seed decides there too."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    Path(numbered).rename(folder / "train.jsonl")
    first, again, other = (load(dataset=str(folder), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ready_tokens(tmp_path: Path) -> None:
    """Ready windows come back as they are, cut to the samples and the length that the recipe asks."""
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
    """A tensor that holds no token windows is named, with its type and shape and what is needed."""
    tensor, *said = BAD_TENSORS[name]
    save_file({name: tensor}, tmp_path / "tokens.safetensors")
    with pytest.raises(CalibrationError) as caught:
        load(tokens=str(tmp_path / "tokens.safetensors"), key=name)
    assert all(part in str(caught.value) for part in [repr(name), *said])


@pytest.mark.parametrize(
    ("settings", "said"),
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
def test_ready_tokens_that_do_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: list[str]
) -> None:
    """A missing tensor, a missing file and too small a tensor: each names value, limit and remedy."""
    monkeypatch.chdir(tmp_path)
    save_file({"calibration": torch.arange(60).view(6, 10)}, "good.safetensors")
    Path("damaged.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(CalibrationError) as caught:
        load(**{"tokens": "good.safetensors", "key": "calibration", **settings})
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        ('{"text": "short"}\n' * 9, {}, ["54 tokens in 9 documents", "need 64", "at most 3 samples"]),
        ('{"text": "short"}\n', {}, ["6 tokens in 1 documents", "need 64: shorten sequence_length"]),
        ("", {}, ["data.jsonl is empty", "give one with text"]),
        ("\n\n", {}, ["data.jsonl: it has no rows; give lines such as"]),
        ('{"text": null}\n{"text": ""}\n', {}, ["no text at all", "give one that has some"]),
        ('{"text": "a"}\n', {"split": "train[:0]"}, ["train[:0]", "check the file and the split"]),
        ('{"text": "a"}\n{"te', {}, ["data.jsonl: line 2, column 2: not valid JSON", "correct or remove"]),
        ('{"txt": "a"}\n', {}, ["no column 'text'", "set text_field to one of: txt"]),
        ('{"txt": "a"}\n', {"messages_field": "chat"}, ["no column 'chat'", "set messages_field to"]),
        ('{"text": 3}\n', {}, ["'text'", "holds int, not text", "set text_field"]),
        ('{"text": [{"role": "user"}]}\n', {}, ["holds list, not text", "set messages_field"]),
        ('{"text": "a"}\n', {"messages_field": "text"}, ["does not fit the model's chat template", "role"]),
    ],
)  # fmt: skip
def test_text_that_does_not_suffice(tmp_path: Path, content: str, settings: dict[str, Any], said: list[str]) -> None:
    """Too few tokens, no rows, a damaged file, a wrong column: one error with value, limit and remedy."""
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError) as caught:
        load(dataset=str(path), **settings)
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("absent.txt", ["absent.txt does not exist", "check the path"]),
        ("present.csv", ["present.csv", "not read here", ".txt, .jsonl"]),
        ("package://absent_module/texts", ["No module named 'absent_module'", "package://MODULE/NAME"]),
        ("package://pydoc_data.topics/absent", ["no attribute 'absent'", "package://MODULE/NAME"]),
        ("package://math/pi", ["math/pi", "not a non-empty mapping or list of texts"]),
        ("package://pydoc_data/absent.txt", ["absent.txt does not exist"]),
    ],
)
def test_sources_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, said: list[str]
) -> None:
    """A missing file, module or name is named, with the form that would be read."""
    monkeypatch.chdir(tmp_path)
    Path("present.csv").write_text("text\na\n")
    with pytest.raises(CalibrationError) as caught:
        load(dataset=dataset)
    assert all(part in str(caught.value) for part in said), str(caught.value)


LETTERS = "Fähre. " * 20
UNREADABLE: list[tuple[str, bytes, str]] = [
    ("utf16.txt", LETTERS.encode("utf-16"), "is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)"),
    ("utf32.txt", LETTERS.encode("utf-32"), "is UTF-32 text"),
    ("unmarked.txt", LETTERS.encode("utf-16-be"), "is UTF-16BE text"),
    ("utf16.jsonl", '{"text": "a"}'.encode("utf-16-le"), "is UTF-16LE text"),
    ("latin.txt", ("plain\n" + LETTERS).encode("latin-1"), "line 2 is not UTF-8 at byte 2 (0xe4); save it as UTF-8"),
    ("latin.jsonl", '{"text": "a"}\n{"text": "ä"}'.encode("latin-1"), "line 2 is not UTF-8 at byte 11 (0xe4)"),
    ("binary.txt", b"\x7fELF\2\1\1\0\xe4\0\0\0", "is binary (a null byte at byte 8), not text"),
    ("plain.jsonl", b"only words\n", "line 1, column 1: not valid JSON (Expecting value); correct or remove the line"),
    ("lists.jsonl", b'[1]\n[2]\n', 'line 1 is a list; each line must be an object, such as {"text": "…"}'),
    ("array.json", b'[{"text": "a"},\n {"text": }]', "line 2, column 11: not valid JSON (Expecting value)"),
    ("lines.json", b'{"text": "a"}\n{"text": "b"\n', "line 2, column 13: not valid JSON"),
    ("words.parquet", b"only words", "is no Parquet file in spite of its name"),
    ("short.parquet", b"PAR1 and then no more", "is a truncated Parquet file; copy it again"),
    ("text.txt.gz", b"\x1f\x8b", "is compressed; unpack it first (gunzip text.txt.gz), then name the file in it"),
    ("folder.txt", b"", "is a folder; give a file in it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), UNREADABLE)
def test_files_that_are_no_text_as_they_should_be(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """Encoding, line, column and remedy are named; no library's words and no other error come out."""
    path = tmp_path / name
    path.mkdir() if name.startswith("folder") else path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load(dataset=str(path))
    assert str(caught.value).startswith(f"the data file {path}"), str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("marked.txt", LETTERS.encode("utf-8-sig")),
        ("marked.jsonl", json.dumps({"text": LETTERS}).encode("utf-8-sig")),
        ("packed.txt", gzip.compress(LETTERS.encode(), mtime=0)),
    ],
)
def test_a_byte_order_mark_and_packed_text_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    """UTF-8 with a byte order mark gives the text without it; what the library unpacks is no binary file."""
    (tmp_path / name).write_bytes(content)
    (document,) = read_documents(TextSource(dataset=str(tmp_path / name)), tiny_tokenizer(), seed=0)
    assert document.strip() == LETTERS.strip()


def test_an_unreachable_hub_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the datasets library raises becomes one error with the cause and what to check."""

    def unreachable(*_: Any, **__: Any) -> None:
        try:
            raise ConnectionError("no route\nto host")
        except ConnectionError as error:
            raise RuntimeError("an error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("llmprune.data.sources.require_own_data", lambda *_, **__: None)
    monkeypatch.setattr("llmprune.data.sources.resolve_revision", lambda *_, **__: SimpleNamespace(resolved="c0ffee"))
    with pytest.raises(CalibrationError, match=r"'a/b' .* ConnectionError: no route to host; .*HF_HUB_OFFLINE"):
        load(dataset="a/b")


def test_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    """Messages for a base model stop with the remedy: a column of plain text, or a chat model."""
    path = write_rows(tmp_path / "chat.jsonl", [CHAT], "messages")
    with pytest.raises(CalibrationError, match=r"no chat template for 'messages' .* or a chat model"):
        load(chat=False, dataset=path, messages_field="messages")
