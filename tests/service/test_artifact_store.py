"""The artefact store, manifests, and the program of a node, without a cluster."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llmprune.common.errors import RecipeError
from llmprune.service.artifacts import node
from llmprune.service.artifacts.manifest import StoredFile, fetch, newest_manifest
from llmprune.service.artifacts.node import NodeTask
from llmprune.service.artifacts.publisher import Publisher, Superseded
from llmprune.service.artifacts.store import ArtifactStore, StoreUnreachable, require_url
from llmprune.service.supervisor.progress import explain


def test_an_attempt_whose_store_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """After its patience an attempt ends with a code of its own; a cancelled one does not start."""
    monkeypatch.setenv("LLMPRUNE_NODE_FOLDER", str(tmp_path / "node"))
    (tmp_path / "store").write_text("no folder")
    before = signal.getsignal(signal.SIGTERM)
    task = NodeTask(
        job="0123456789ab", attempt=1, data_dir="/data", command=("true",), environment={}, keep_hub=False,
        log_limit=100, store=f"file://{tmp_path / 'store'}", patience=0.01,
    )  # fmt: skip
    assert node.main([task.model_dump_json()]) == node.NO_STORE
    assert "its files are kept in" in capfd.readouterr().err
    assert "could not reach the artefact store" in explain(tmp_path / "log.txt", node.NO_STORE)
    (tmp_path / "store").unlink()
    ArtifactStore(task.store or "").write("0123456789ab/stop/1", b"stop")
    assert node.main([task.model_dump_json()]) == 1
    signal.signal(signal.SIGTERM, before)


def publisher(folder: Path, attempt: int, store: ArtifactStore) -> Publisher:
    """Return the publisher of an attempt with a run folder of two files."""
    run = folder / f"node-{attempt}" / "run"
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text("{}")
    (run / "weights").write_bytes(b"w" * 1000)
    found = Publisher(store, "job", attempt, run.parent, newest_manifest(store, "job"))
    found.begin()
    return found


def test_manifests(tmp_path: Path) -> None:
    """Unchanged contents are stored once; what is no longer listed is removed; an earlier attempt cannot go on."""
    store = ArtifactStore(f"file://{tmp_path / 'store'}")
    first = publisher(tmp_path, 1, store)
    first.publish_changes()
    first.publish_changes()  # nothing has changed
    assert first.last is not None
    assert (first.last.number, len(store.keys("job/objects/")), first.last.bytes) == (0, 2, 1002)
    (first.run_folder / "run.json").write_text('{"new": 1}')
    first.publish()
    assert (first.last.number, len(store.keys("job/objects/"))) == (1, 2)
    second = publisher(tmp_path, 2, store)
    first._next_check = 0.0
    second.publish()
    assert second.last is not None
    one, other = (found.last.find("weights") for found in (first, second) if found.last)
    assert one is not None
    assert other is not None
    assert (one.key, one.sha256) == (other.key, other.sha256)
    with pytest.raises(Superseded):
        first.publish_changes()
    second.sweep()
    assert len(store.keys("job/manifests/")) == 1
    store.write("job/manifests/000003-00000000.json", b"torn")
    assert newest_manifest(store, "job") == second.last
    weights = second.last.find("weights")
    assert weights is not None
    store.write(weights.key, b"x" * 1000)
    assert fetch(store, second.last, folder=tmp_path / "fetched") == ["weights"]
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["run.json"]


def test_a_run_that_changes_while_it_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy during which the run named other files is none, and nothing is published."""
    store = ArtifactStore(f"file://{tmp_path / 'store'}")
    one = publisher(tmp_path, 1, store)
    link = os.link

    def link_late(source: Path, target: Path) -> None:
        (one.run_folder / "run.json").unlink()
        (one.run_folder / "run.json").write_text("{}")
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    one.publish()
    assert (one.last, store.keys("job/objects/")) == (None, [])


def test_files_outside_the_run_folder() -> None:
    """A manifest cannot name files elsewhere."""
    for name in ("../log.txt", "/etc/passwd", ""):
        with pytest.raises(ValueError, match="outside the run folder"):
            StoredFile(name=name, key="job/objects/1", bytes=1, sha256="0" * 64)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [("bucket", "give a URL"), ("s3://key:secret@bucket/a", "by the environment"), ("no://x", "give s3://bucket")],
)
def test_urls_of_stores(url: str, remedy: str) -> None:
    """A URL without protocol, with credentials or of an unknown protocol is refused; the secret is not repeated."""
    with pytest.raises(RecipeError, match=remedy) as caught:
        ArtifactStore(require_url(url)).check()
    assert "secret" not in str(caught.value)


def test_a_store_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the install line; a store that refuses is an error with the address."""

    def url_to_fs(*_: object, **__: object) -> None:
        raise ImportError("Please install s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(RecipeError, match=r"uv pip install 'llmprune\[s3\]'"):
        ArtifactStore("s3://bucket/prefix")
    monkeypatch.undo()
    with pytest.raises(StoreUnreachable, match=r"file:///proc/none cannot be used"):
        ArtifactStore("file:///proc/none").check()
