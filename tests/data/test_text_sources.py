"""Sources of text: files, packages and the hub are read, and every fault is reported with its remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.hub.published import publish_text
from helpers.hub.server import Hub
from helpers.tiny import tiny_tokenizer
from helpers.windows import decoded, load, write_rows

from llmprune.common.errors import CalibrationError
from llmprune.data.sources import load_text, local_bytes, read_documents, require_present
from llmprune.recipe.text_source import TextSource

CHAT = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]
TOPICS = "package://pydoc_data.topics/topics"


def test_messages_are_rendered_with_the_chat_template(tmp_path: Path) -> None:
    """A column of messages is rendered with the model's chat template."""
    windows_NL = load(
        dataset=write_rows(tmp_path / "chat.jsonl", [CHAT] * 20, "messages"),
        messages_field="messages",
        samples=1,
        sequence_length=40,
    )
    assert decoded(windows_NL)[0].startswith("<user>two plus two?\n<assistant>four\n<|end|>")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_local_files(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Text, JSON lines and parquet files are read, without output where there is no terminal."""
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
    """An edited file is not served from the cache of the datasets library."""
    path = tmp_path / "data.jsonl"
    for letter in "ab":
        write_rows(path, [letter * 100] * 9)
        assert decoded(load(dataset=str(path)))[0][0] == letter


def test_package_text_and_its_split() -> None:
    """The texts of an installed module are readable, and train[:80%] shares no row with train[80%:]."""
    rows = {
        split: list(load_text(TextSource(dataset=TOPICS, split=split))["text"])
        for split in ("train", "train[:80%]", "train[80%:]")
    }
    assert rows["train"] == rows["train[:80%]"] + rows["train[80%:]"]
    assert not set(rows["train[:80%]"]) & set(rows["train[80%:]"])
    assert load(dataset=TOPICS, split="train[:80%]", samples=64, sequence_length=256).shape == (64, 256)


@pytest.mark.parametrize(("split", "streaming"), [("train", True), ("train[:10%]", False), ("a+b", False)])
def test_hub_data_is_streamed_unless_sliced(
    hub: Hub, split: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set is streamed, at the commit of its branch; for a slice all of it is downloaded."""
    commit = publish_text(hub).refs["main"]
    asked: dict[str, Any] = {}

    def load_dataset(*names: str, **options: Any) -> datasets.Dataset:
        asked.update(options, names=names)
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_text(TextSource(dataset="org/text", config="en", split=split))
    assert asked == {"names": ("org/text", "en"), "split": split, "revision": commit, "streaming": streaming}


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"text": "short"}\n' * 9, {}, ["54 tokens in 9 documents", "need 64", "at most 3 samples"]),
        ('{"text": "short"}\n', {}, ["6 tokens in 1 documents", "need 64: shorten sequence_length"]),
        ("", {}, ["data.jsonl is empty", "give one with text"]),
        ("\n\n", {}, ["data.jsonl: it has no rows; give lines such as"]),
        ('{"text": null}\n{"text": ""}\n{"text": " \\n\\t"}\n', {}, ["all its rows are blank", "give a source"]),
        ('{"text": "a"}\n', {"split": "train[:0]"}, ["train[:0]", "check the file and the split"]),
        ('{"text": "a"}\n{"te', {}, ["data.jsonl: line 2, column 2: not valid JSON", "correct or remove"]),
        ('{"txt": "a"}\n', {}, ["no column 'text'", "set text_field to one of: txt"]),
        ('{"txt": "a"}\n', {"messages_field": "chat"}, ["no column 'chat'", "set messages_field to"]),
        ('{"text": 3}\n', {}, ["'text'", "holds int, not text", "set text_field"]),
        ('{"text": [{"role": "user"}]}\n', {}, ["holds list, not text", "set messages_field"]),
        ('{"text": "a"}\n', {"messages_field": "text"}, ["does not fit the model's chat template", "role"]),
    ],
)  # fmt: skip
def test_insufficient_text(tmp_path: Path, content: str, settings: dict[str, Any], message: list[str]) -> None:
    """Too few tokens, no rows, a damaged file or a wrong column give one error with value, limit and remedy."""
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError) as caught:
        load(dataset=str(path), **settings)
    assert all(part in str(caught.value) for part in message), str(caught.value)


def test_blank_texts_are_no_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows of only white space are left out and logged: the windows are those of the other rows."""
    words = [f"document number {index}" for index in range(3)]
    path = write_rows(tmp_path / "data.jsonl", [" ", *words, "\n\t", "\u00a0"])
    with caplog.at_level("INFO", logger="llmprune"):
        read = list(read_documents(TextSource(dataset=path), tiny_tokenizer(), seed=0))
    assert sorted(read) == words
    assert f"{path} (train): 3 of 6 rows are blank and left out" in caplog.messages


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("absent.txt", ["absent.txt does not exist", "check the path"]),
        ("~/absent.txt", ["absent.txt does not exist", "write the whole path in place of ~"]),
        ("present.csv", ["present.csv", "cannot be read", ".txt, .jsonl"]),
        ("package://absent_module/texts", ["No module named 'absent_module'", "package://MODULE/NAME"]),
        ("package://pydoc_data.topics/absent", ["no attribute 'absent'", "package://MODULE/NAME"]),
        ("package://math/pi", ["math/pi", "not a non-empty mapping or list of texts"]),
        ("package://asyncio/*.absent", ["matches no file with text; check package and pattern"]),
        ("package://pydoc_data/absent.txt", ["absent.txt does not exist"]),
    ],
)
def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, message: list[str]) -> None:
    """A missing file, module or name is reported by name, with the form to use."""
    monkeypatch.chdir(tmp_path)
    Path("present.csv").write_text("text\na\n")
    with pytest.raises(CalibrationError) as caught:
        load(dataset=dataset)
    assert all(part in str(caught.value) for part in message), str(caught.value)


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


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """The error has encoding, line, column and remedy, and no message of a library."""
    path = tmp_path / name
    path.mkdir() if name.startswith("folder") else path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load(dataset=str(path))
    assert str(caught.value).startswith(f"the data file {path}"), str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("marked.txt", LETTERS.encode("utf-8-sig")),
        ("marked.jsonl", json.dumps({"text": LETTERS}).encode("utf-8-sig")),
        ("packed.txt", gzip.compress(LETTERS.encode(), mtime=0)),
    ],
)
def test_a_byte_order_mark_and_compressed_text_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    """A byte order mark is not part of the text, and a file that the library decompresses is not binary."""
    (tmp_path / name).write_bytes(content)
    (document,) = read_documents(TextSource(dataset=str(tmp_path / name)), tiny_tokenizer(), seed=0)
    assert document.strip() == LETTERS.strip()


def test_an_unreachable_hub_names_the_remedies(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the datasets library becomes one error with its root cause and the settings to check."""
    publish_text(hub)

    def unreachable(*_: Any, **__: Any) -> None:
        try:
            raise ConnectionError("no route\nto host")
        except ConnectionError as error:
            raise RuntimeError("an error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CalibrationError, match=r"'org/text' .* ConnectionError: no route to host; .*HF_HUB_OFFLINE"):
        load(dataset="org/text")


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    """A tokenizer without a chat template gets conversations as paragraphs that begin with the role."""
    path = write_rows(tmp_path / "chat.jsonl", [CHAT], "messages")
    windows_NL = load(chat=False, dataset=path, messages_field="messages", samples=1, sequence_length=36)
    assert decoded(windows_NL) == ["user: two plus two?\n\nassistant: four"]
    wrong = write_rows(tmp_path / "wrong.jsonl", ["no messages"], "messages")
    with pytest.raises(CalibrationError, match=r"'messages' of .* holds no lists of .* set text_field"):
        load(chat=False, dataset=wrong, messages_field="messages")


def test_a_pattern_of_files_in_a_package() -> None:
    """Each file that the pattern matches is a document."""
    (text,) = decoded(load(dataset="package://asyncio/*_events.py", samples=1, sequence_length=64))
    assert text.isprintable() or "\n" in text
    assert len(load_text(TextSource(dataset="package://asyncio/*_events.py"))) == 5


@pytest.mark.parametrize("pattern", ["**.py", "/*", "../*.py", "*.absent"])
def test_a_pattern_that_matches_no_file(pattern: str) -> None:
    """It is an error of the text, also where it is no pattern of files below the package."""
    source = TextSource(dataset=f"package://asyncio/{pattern}")
    assert local_bytes(source) == 0
    with pytest.raises(CalibrationError, match=r"package and pattern|package://MODULE/NAME"):
        require_present(source)


@pytest.mark.parametrize("name", ["text.txt ", "my text", "a/b/c"])
def test_a_name_that_is_neither_a_file_nor_a_hub_id(name: str) -> None:
    """It is refused by the plan, before the hub is asked."""
    with pytest.raises(CalibrationError, match=rf"there is no file '{name}' .*it is no hub id: that is org/name"):
        require_present(TextSource(dataset=name))


def test_reading_a_file_sends_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's counter of loads is asked nothing, also where the variable that turns it off is not set."""
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    monkeypatch.delenv("HF_UPDATE_DOWNLOAD_COUNTS", raising=False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.load, "get_session", lambda: pytest.fail("a request"))
    assert load_text(TextSource(dataset=str(tmp_path / "text.txt"))).num_rows == 2
