"""Attacks by what a data set names: nothing is asked or opened but its own files, and no answer tells what is there."""

from __future__ import annotations

import gzip
import io
import json
import socket
import tarfile
import threading
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.hub.published import ROWS
from helpers.hub.server import Hub
from helpers.tiny import tiny_tokenizer

from llmprune.common.errors import CalibrationError
from llmprune.data.sources import read_documents
from llmprune.recipe.text_source import TextSource

SAID = "names data that is no relative path in the data set itself, and nothing else is read; correct data_files"


class Inner:
    """A service of the inner network that nobody outside is to reach: it notes who connects, and hangs up."""

    def __init__(self) -> None:
        self.asked = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            self.asked += 1
            connection.close()


@pytest.fixture(scope="module")
def inner() -> Inner:
    """One for all tests: none of them is to reach it."""
    return Inner()


def card(**metadata: Any) -> bytes:
    """A README.md with metadata."""
    return f"---\n{yaml.safe_dump(metadata)}---\n# Text\n".encode()


def config(**fields: Any) -> dict[str, Any]:
    """Metadata of one configuration."""
    return {"configs": [{"config_name": "default", **fields}]}


def publish(hub: Hub, files: dict[str, bytes]) -> str:
    """A new data set of a hundred rows and these files: its name, for datasets remembers the files of a commit."""
    name = f"org/text-{uuid.uuid4().hex}"
    hub.add_repo(name, {"train.jsonl": ROWS.encode()} | files, "dataset")
    return name


def read(dataset: str, **fields: Any) -> list[str]:
    """The texts of a data set."""
    return list(read_documents(TextSource(dataset=dataset, **fields), tiny_tokenizer(), seed=0))


def refusal(dataset: str, **fields: Any) -> str:
    """Return the message that refuses to read it."""
    with pytest.raises(CalibrationError) as caught:
        read(dataset, **fields)
    return str(caught.value)


@pytest.mark.parametrize("split", ["train", "train[:50%]"])
@pytest.mark.parametrize("where", ["card", "standalone", "data_dir", "second"])
def test_a_card_makes_no_request(hub: Hub, inner: Inner, where: str, split: str) -> None:
    """An address on the inner network is refused, and nobody connected to it; streamed, and as a whole."""
    url = f"{inner.url}/latest/meta-data.jsonl"
    files = {
        "card": {"README.md": card(**config(data_files=url))},
        "standalone": {"README.md": card(), ".huggingface.yaml": yaml.safe_dump(config(data_files=url)).encode()},
        "data_dir": {"README.md": card(**config(data_dir=url))},
        "second": {
            "README.md": card(
                configs=[
                    {"config_name": "default", "data_files": "train.jsonl"},
                    {"config_name": "other", "data_files": [{"split": "train", "path": ["train.jsonl", url]}]},
                ]
            )
        },
    }
    assert SAID in refusal(publish(hub, files[where]), split=split)
    assert inner.asked == 0


def test_a_card_learns_nothing_of_this_machine(hub: Hub, tmp_path: Path, inner: Inner) -> None:
    """A file that is here, one that is not, a server that listens and one that does not: the same sentence."""
    here = tmp_path / "here.jsonl"
    here.write_text(ROWS)
    named = (str(here), str(tmp_path / "missing.jsonl"), f"{inner.url}/x.jsonl", "http://127.0.0.1:9/x.jsonl")
    said = set()
    for name in named:
        dataset = publish(hub, {"README.md": card(**config(data_files=name))})
        said.add(refusal(dataset).replace(dataset, "it"))
    assert len(said) == 1
    assert SAID in said.pop()


@pytest.mark.parametrize(
    "name",
    [
        "../../datasets/org/private/train.jsonl",
        "data/../../x.jsonl",
        "hf://datasets/org/private/train.jsonl",
        "zip://x.jsonl::http://127.0.0.1:9/x.zip",
        "file:///etc/x.jsonl",
        "..\\x.jsonl",
        "~/x.jsonl",
        "//127.0.0.1/x.jsonl",
    ],
)
def test_other_ways_out_of_a_data_set(hub: Hub, name: str) -> None:
    """Other repositories, archives elsewhere, links by scheme or by dots."""
    assert SAID in refusal(publish(hub, {"README.md": card(**config(data_files=[{"split": "train", "path": name}]))}))


@pytest.mark.parametrize(
    "files",
    [
        "train.jsonl",
        ["train.jsonl", "data/test.jsonl"],
        [{"split": "train", "path": "*.jsonl"}, {"split": "test", "path": ["data/test*", "more/**"]}],
    ],
)
def test_an_ordinary_card_is_read_as_ever(hub: Hub, files: object) -> None:
    """Relative paths and patterns, by split or not."""
    readme = card(license="mit", **config(data_files=files))
    dataset = publish(hub, {"README.md": readme, "data/test.jsonl": ROWS.encode()})
    assert len(read(dataset)) in (100, 200)
    assert len(read(dataset, split="train[:50%]")) in (50, 100)


def test_a_folder_of_data_has_a_card_too(tmp_path: Path, inner: Inner) -> None:
    """What was downloaded by hand is no more to be trusted; links out of it are named."""
    folder, private = tmp_path / "data", tmp_path / "private.jsonl"
    folder.mkdir()
    (folder / "train.jsonl").write_text(ROWS)
    private.write_text(ROWS)
    assert len(read(str(folder))) == 100
    (folder / "README.md").write_bytes(card(**config(data_files=f"{inner.url}/x.jsonl")))
    assert SAID in refusal(str(folder))
    (folder / "README.md").write_bytes(card(**config(data_files=str(private))))
    assert SAID in refusal(str(folder))
    assert inner.asked == 0
    (folder / "README.md").unlink()
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to(private)
    assert "'train.jsonl' in the data folder" in refusal(str(folder))


@pytest.mark.parametrize("split", ["train", "train[:50%]"])
def test_a_row_makes_no_request(hub: Hub, inner: Inner, split: str) -> None:
    """A column of images names files and addresses by row; rows are read without it."""
    row = {"text": "words", "image": {"bytes": None, "path": f"{inner.url}/x.png"}}
    features = [{"name": "text", "dtype": "string"}, {"name": "image", "dtype": "image"}]
    files = {"train.jsonl": (json.dumps(row) + "\n").encode() * 4}
    dataset = publish(hub, files | {"README.md": card(dataset_info={"features": features})})
    assert set(read(dataset, split=split)) == {"words"}
    assert "no column 'image'" in refusal(dataset, split=split, text_field="image")
    assert inner.asked == 0


def test_text_of_a_package_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``package://`` leads nowhere else, by dots or by an absolute path."""
    (tmp_path / "somepackage").mkdir()
    (tmp_path / "somepackage" / "__init__.py").touch()
    (tmp_path / "private.txt").write_text("secret")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("../private.txt", str(tmp_path / "private.txt")):
        assert "does not name a part of a package" in refusal(f"package://somepackage/{name}")


def tar_of_links(target: Path) -> bytes:
    """A tar whose first link leads out only once the second is there: until then it looks harmless."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, leads in (("l.txt", "s/" * 15 + "../" * 15 + str(target).lstrip("/")), ("s", ".")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, leads
            archive.addfile(link)
    return content.getvalue()


def zip_of(member: str) -> bytes:
    """A zip with a member of this name."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(member, "hello\n")
        archive.writestr("b.txt", "ok\n")
    return content.getvalue()


ARCHIVE = "is an archive"


def test_a_tar_of_links_opens_nothing(hub: Hub, tmp_path: Path) -> None:
    """Whatever its name says: on the hub, in a folder, and as a single file."""
    (tmp_path / "private.txt").write_text("TOP SECRET\n")
    content = tar_of_links(tmp_path / "private.txt")
    repository = f"org/tar-{uuid.uuid4().hex}"
    hub.add_repo(repository, {"train.txt": content}, "dataset")
    said = refusal(repository, split="train[:100%]")
    assert ("is an archive (tar)" in said, repository in said) == (True, True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.txt").write_bytes(content)
    assert ARCHIVE in refusal(str(tmp_path / "folder"), split="train[:100%]")
    (tmp_path / "single.txt").write_bytes(content)
    assert ARCHIVE in refusal(str(tmp_path / "single.txt"))


@pytest.mark.parametrize("split", ["train", "train[:100%]"])
@pytest.mark.parametrize("there", [True, False])
def test_the_names_in_a_zip_lead_nowhere(hub: Hub, tmp_path: Path, there: bool, split: str) -> None:
    """A member's name becomes a part of an address: another archive of this machine, with one answer for all."""
    if there:
        with zipfile.ZipFile(tmp_path / "private.docx", "w") as private:
            private.writestr("word/document.txt", "TOP SECRET\n")
    repository = f"org/zip-{uuid.uuid4().hex}"
    hub.add_repo(repository, {"train.zip": zip_of(f"word::{tmp_path}/private.docx/document.txt")}, "dataset")
    assert f"{repository!r} is an archive (zip)" in refusal(repository, split=split)


@pytest.mark.parametrize("member", ["a.txt::ftp:/{}/y.txt", "a.txt::webhdfs:/{}/d/y.txt"])
@pytest.mark.parametrize("split", ["train", "train[:100%]"])
def test_the_names_in_a_zip_make_no_request(hub: Hub, inner: Inner, member: str, split: str) -> None:
    """An address in a member's name is asked by nobody."""
    repository, before = f"org/zip-{uuid.uuid4().hex}", inner.asked
    hub.add_repo(repository, {"train.zip": zip_of(member.format(inner.url.removeprefix("http://")))}, "dataset")
    assert ARCHIVE in refusal(repository, split=split)
    assert inner.asked == before


def test_a_file_that_is_compressed_alone_is_read(hub: Hub) -> None:
    """What gzip makes of one file has no names in it."""
    repository = f"org/gzip-{uuid.uuid4().hex}"
    hub.add_repo(repository, {"train.jsonl.gz": gzip.compress(ROWS.encode())}, "dataset")
    assert len(read(repository)) == len(read(repository, split="train[:100%]")) == 100


@pytest.mark.parametrize("field", ["version", "config_name"])
@pytest.mark.parametrize("value", ["{}/made", "../../made", "..", "a/b"])
def test_a_card_chooses_no_folder(hub: Hub, tmp_path: Path, field: str, value: str) -> None:
    """A version and a configuration's name become parts of a path that is written to."""
    fields = {"data_files": "train.jsonl", field: value.format(tmp_path)}
    repository = publish(hub, {"README.md": card(**config(**fields))})
    before = set(tmp_path.parent.rglob("made"))
    assert "version or a config_name that is no plain word" in refusal(repository, split="train[:50%]")
    assert set(tmp_path.parent.rglob("made")) == before


def test_harmless_cards_of_other_shapes_are_read(hub: Hub) -> None:
    """An empty folder, a version by its number and a name with a dash."""
    repository = publish(
        hub, {"README.md": card(**config(data_files="train.jsonl", data_dir="", version="1.2.3", config_name="en-2"))}
    )
    assert len(read(repository, config="en-2")) == 100
