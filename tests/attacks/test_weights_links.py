"""Names in indices and links: no weights file outside the model's folder is opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.hub.published import files_of
from helpers.hub.server import Hub
from helpers.named_files import ELSEWHERE, WEIGHTS, edit, index

from llmprune.checkpoint.download import _as_named
from llmprune.checkpoint.file_references import INDEX
from llmprune.checkpoint.loading import load_config, load_model, load_tokenizer
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.recipe.model import ModelSource
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.settings import Settings


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_names_files_of_its_own_folder(
    model: Path, tmp_path: Path, hub: Hub, opened: list[Path], name: str
) -> None:
    """A private file whose tensors fit the config is not opened, by a hub repository or by a folder under a root."""
    private = tmp_path / "private" / "x.safetensors"
    private.parent.mkdir()
    spoilt = index(name.format(private=private), model)
    shutil.move(model / WEIGHTS, private)
    (model / INDEX).write_bytes(spoilt)
    hub.add_repo("org/thief", files_of(model))
    recipe = "model: {id: model}\ncalibration: {dataset: org/text}\n"
    admitted, overrides = admit(recipe, (), settings=Settings(data_dir=tmp_path / "data", allow_roots=(model.parent,)))
    assert overrides == [f'model.id="{model}"']
    for place in (str(model), "org/thief"):
        with pytest.raises(CheckpointError, match=r"no file of that model's own folder; .* get a whole checkpoint"):
            load_model(ModelSource(id=place))
    assert opened == []
    assert admitted.model.id == "model"


def test_an_index_beside_whole_weights_is_held_to_the_same_rule(model: Path) -> None:
    """Whichever of the two transformers prefers."""
    (model / INDEX).write_bytes(index("/x.safetensors", model))
    with pytest.raises(CheckpointError, match="own folder"):
        load_model(ModelSource(id=str(model)))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "LICENSE", "additional_chat_templates/x.jinja"])
def test_a_link_out_of_a_folder_is_refused(model: Path, tmp_path: Path, opened: list[Path], name: str) -> None:
    """What a link leads to is looked at before anything is opened; a link inside the folder is a file like others."""
    outside = tmp_path / "outside"
    (model / name).parent.mkdir(exist_ok=True)
    if (model / name).is_file():
        shutil.move(model / name, outside)
    else:
        outside.write_text("secret")
    (model / name).symlink_to(outside)
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(ModelError, match=f"'{name}' of .* leads out of the model's folder.*; put the file itself"):
            load(ModelSource(id=str(model)))
    assert opened == []
    (model / name).unlink()
    shutil.move(outside, model / "real")
    (model / name).symlink_to(model / "real")
    load_model(ModelSource(id=str(model)))


def test_a_shard_behind_a_linked_folder_is_refused(model: Path, tmp_path: Path, opened: list[Path]) -> None:
    """A plain name may lead out of the folder too."""
    (model / INDEX).write_bytes(index("sub/x.safetensors", model))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(model / WEIGHTS, tmp_path / "elsewhere" / "x.safetensors")
    (model / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="own folder"):
        load_model(ModelSource(id=str(model)))
    assert opened == []


def test_an_index_lies_beside_the_config(model: Path, tmp_path: Path, opened: list[Path]) -> None:
    """transformers joins an index's names to the model's folder, where they may be links that the index's has not."""
    private = tmp_path / "private"
    (model / "sub").mkdir()
    private.mkdir()
    (model / "sub" / "x.safetensors.index.json").write_bytes(index("d/x.safetensors", model))
    shutil.move(model / WEIGHTS, private / "x.safetensors")
    (model / "d").symlink_to(private)
    edit(model / "config.json", lambda data: data.update(transformers_weights="sub/x.safetensors.index.json"))
    with pytest.raises(ModelError, match=r"an index in a folder of its own.*put the index beside config\.json"):
        load_model(ModelSource(id=str(model)))
    (model / "sub" / "x.safetensors.index.json").rename(model / "x.safetensors.index.json")
    edit(model / "config.json", lambda data: data.update(transformers_weights="x.safetensors.index.json"))
    with pytest.raises(CheckpointError, match="own folder"):
        load_model(ModelSource(id=str(model)))
    assert opened == []


@pytest.mark.parametrize("name", ["README.md", "figure.png", ".gitattributes", "pytorch_model.bin"])
def test_a_link_that_nothing_reads_is_left_alone(model: Path, tmp_path: Path, name: str) -> None:
    """A model's card may be shared by several folders."""
    (tmp_path / "outside").write_text("text")
    (model / name).symlink_to(tmp_path / "outside")
    load_model(ModelSource(id=str(model)))
    load_tokenizer(ModelSource(id=str(model)))


def as_snapshot(model: Path, cache: Path, shared: bool) -> Path:
    """The folder as a snapshot in a hub client's cache, whose large blobs all repositories may share."""
    repository = cache / "models--org--base"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    for folder in (snapshot, blobs, cache / "blobs" / "ab"):
        folder.mkdir(parents=True)
    for number, path in enumerate(model.iterdir()):
        blob = blobs / str(number)
        shutil.copyfile(path, cache / "blobs" / "ab" / blob.name if shared else blob)
        if shared:
            blob.symlink_to(Path("../../blobs/ab") / blob.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hub_client_is_its_links(model: Path, tmp_path: Path, shared: bool) -> None:
    """Links into the cache's stores are the snapshot's own files; a link to another repository's is not."""
    snapshot = as_snapshot(model, tmp_path / "cache", shared)
    load_model(ModelSource(id=str(snapshot)))
    load_tokenizer(ModelSource(id=str(snapshot)))
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(model / WEIGHTS)
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        load_model(ModelSource(id=str(snapshot)))


def test_a_shared_blob_is_checked_by_the_name_that_its_repository_gives_it(tmp_path: Path) -> None:
    """The store of all repositories names files by another hash than the SHA-256 of their content."""
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of b"abc"
    store, blob, file = tmp_path / ("e" * 64), tmp_path / digest, tmp_path / WEIGHTS
    store.write_bytes(b"abc")
    blob.symlink_to(store.name)
    file.symlink_to(blob.name)
    assert _as_named(file)
    store.write_bytes(b"abd")
    assert not _as_named(file)
