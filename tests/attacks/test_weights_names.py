"""Attacks by the names in a model's files: transformers is given no folder that names anything outside itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils
from helpers.commands import save_model
from helpers.hub.server import Hub
from helpers.small_disks import files_of
from huggingface_hub import constants
from safetensors import safe_open

from llmprune.checkpoint.download import _has_its_hash
from llmprune.checkpoint.file_references import INDEX
from llmprune.checkpoint.loading import load_config, load_model, load_tokenizer
from llmprune.common.errors import CheckpointError, LLMPruneError, ModelError
from llmprune.recipe.model import ModelSource
from llmprune.service.jobs.recipe_policy import admit
from llmprune.service.settings import Settings

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, made once."""
    return save_model(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "root" / "model"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The weights files that transformers opens, with all links resolved."""
    found: list[Path] = []

    def watch(path: str, *arguments: Any, **options: Any) -> Any:
        found.append(Path(path).resolve())
        return safe_open(path, *arguments, **options)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", watch)
    return found


def index(shard: str, folder: Path) -> bytes:
    """An index that maps every tensor of a folder's weights to one file."""
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        names = list(weights.keys())
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}).encode()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place; one that is not there begins empty."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    change(data)
    path.write_text(json.dumps(data))


ELSEWHERE = [
    "{private}",
    "../../private/x.safetensors",
    "a/../../../private/x.safetensors",
    "~/x",
    "file:x",
    "..\\x",
    "",
]


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
        with pytest.raises(CheckpointError, match=r"no file of that model's own folder; .* get a complete checkpoint"):
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
    with pytest.raises(ModelError, match=r"an index in a subfolder.*put the index beside config\.json"):
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
    assert _has_its_hash(file)
    store.write_bytes(b"abd")
    assert not _has_its_hash(file)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation in the config.json"),
        ("config.json", {"text_config": {"_attn_implementation": "paged|a/b:c"}}, "_attn_implementation in"),
        ("config.json", {"attn_implementation": {"text_config": "a/b"}}, "attn_implementation in"),
        ("config.json", {"transformers_weights": "../x.safetensors"}, "transformers_weights in"),
        ("config.json", {"backbone": "someone/backbone"}, "backbone in"),
        ("config.json", {"vision_config": {"architecture": "hf-hub:someone/model"}}, "architecture in"),
        ("config.4.0.0.json", {"transformers_weights": "/x.safetensors"}, "transformers_weights in the config.4.0.0"),
        ("config.json", {"tokenizer_class": "AutoProcessor"}, "tokenizer_class in"),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaForCausalLM"}, "tokenizer_class in"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["/private/tokenizer.4.0.json"]}, "fast_tokenizer_files"),
        ("tokenizer_config.json", {"vocab": "/private/vocab.json"}, "vocab in the tokenizer_config.json"),
        ("tokenizer_config.json", {"init_inputs": ["/private/vocab.json"]}, "init_inputs in"),
        ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/private/x.model"}}, "model_file in"),
        ("tokenizer_config.json", {"mecab_kwargs": {"mecab_option": "-d /private"}}, "mecab_option in"),
        ("tokenizer_config.json", {"chat_template": [{"name": "../../x", "template": ""}]}, "chat_template in"),
        ("tokenizer_config.json", {"chat_template": {"default": "", "/x": ""}}, "chat_template in"),
        ("special_tokens_map.json", {"tokenizer_file": "/private/tokenizer.json"}, "tokenizer_file in the special_tok"),
        ("special_tokens_map.json", {"source_spm": "/private/x.spm"}, "source_spm in the special_tokens_map.json"),
        ("special_tokens_map.json", {"vocab": 5}, "vocab in the special_tokens_map.json"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["d/tokenizer.4.0.json"]}, "fast_tokenizer_files"),
        (
            "byte_maps.json",
            {"decompose_map": "/private/x.json", "merge_map": {}},
            "decompose_map in the byte_maps",
        ),
        ("byte_maps.json", {"decompose_map": {}, "merge_map": "/private/x.json"}, "merge_map in the byte_maps.json"),
        ("tokenizer.4.0.0.json", {"model": {"vocab": "/private/x"}}, "vocab in the tokenizer.4.0.0.json"),
        ("tokenizer.json", {"model": {"vocab": {}, "merges": "/private/x"}}, "merges in the tokenizer.json"),
        ("special_tokens_map.json", {"name_or_path": "someone/model"}, "name_or_path in the special_tokens_map.json"),
        ("adapter_config.json", {"base_model_name_or_path": "/private"}, "holds an adapter"),
    ],
)
def test_no_field_names_another_file_or_repository(model: Path, name: str, fields: dict[str, Any], said: str) -> None:
    """Each field that transformers would follow is refused by its name, before transformers reads it."""
    edit(model / name, lambda data: data.update(fields))
    with pytest.raises(ModelError, match=said):
        load_tokenizer(ModelSource(id=str(model)))


def test_files_that_an_older_version_named_are_not_opened(model: Path, tmp_path: Path) -> None:
    """Paths that old tokenizers carry with them are common: the folder's own files count, and nothing else is read."""
    private = tmp_path / "private.json"
    private.write_text("no tokenizer")
    names = ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "gguf_file", "source_spm", "target_spm")
    before = load_tokenizer(ModelSource(id=str(model)))("text")
    edit(model / "tokenizer_config.json", lambda data: data.update(dict.fromkeys(names, str(private))))
    tokenizer = load_tokenizer(ModelSource(id=str(model)))
    assert tokenizer("text") == before
    assert str(private) not in json.dumps(tokenizer.init_kwargs, default=str)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert str(private) not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_a_private_tokenizer_is_not_read_by_a_map_of_special_tokens(model: Path, tmp_path: Path) -> None:
    """transformers takes every key of that map for an argument: the private vocabulary would be in the result."""
    edit(model / "special_tokens_map.json", lambda data: data.update(tokenizer_file=str(tmp_path / "private.json")))
    shutil.move(model / "tokenizer.json", tmp_path / "private.json")
    with pytest.raises(
        ModelError, match=r"tokenizer_file in the special_tokens_map\.json of .* outside the model's own"
    ):
        load_tokenizer(ModelSource(id=str(model)))


@pytest.mark.parametrize("exists", [True, False])
def test_a_private_vocabulary_is_not_read_by_a_tokenizer(model: Path, tmp_path: Path, exists: bool) -> None:
    """A tokenizer's class opens a text in place of the vocabulary, and would tell whether there is such a file."""
    private = tmp_path / "private.txt"
    if exists:
        private.write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nsecret\n")
    words = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    described = words | {"max_input_chars_per_word": 9, "vocab": str(private)}
    steps = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    edit(model / "tokenizer.json", lambda data: data.update(steps, added_tokens=[], model=described))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ModelError, match=r"vocab in the tokenizer\.json of .* which names something outside"):
        load_tokenizer(ModelSource(id=str(model)))


@pytest.mark.parametrize("name", ["LlamaTokenizer ", "Tekken", "AutoProcessor"])
def test_the_weights_need_no_tokenizers_class(model: Path, name: str) -> None:
    """A word that is no tokenizer's class is called that, and only where the tokenizer is asked for."""
    for file in ("tokenizer_config.json", "config.json"):
        edit(model / file, lambda data: data.update(tokenizer_class=name))
        load_model(ModelSource(id=str(model)))
        with pytest.raises(
            ModelError, match=rf"tokenizer_class in the {file} of .*'{name}', and only tokenizer classes"
        ):
            load_tokenizer(ModelSource(id=str(model)))
        edit(model / file, lambda data: data.pop("tokenizer_class"))


def test_trusted_code_is_the_repositorys_own(model: Path) -> None:
    """Whoever trusts a repository's code did not trust the repository that it names."""
    edit(model / "config.json", lambda data: data.update(auto_map={"AutoConfig": "someone/else--code.Config"}))
    with pytest.raises(ModelError, match=r"auto_map in the config\.json"):
        load_config(ModelSource(id=str(model), trust_remote_code=True))
    load_config(ModelSource(id=str(model)))  # no code is run, so nothing is fetched


@pytest.mark.parametrize("file", ["../x.gguf", "sub/../../x.gguf", "{private}/x.gguf"])
def test_a_packaged_model_lies_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """``package://`` leads nowhere else, by dots or by an absolute path."""
    (tmp_path / "somepackage" / "sub").mkdir(parents=True)
    (tmp_path / "somepackage" / "__init__.py").touch()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="has no GGUF file"):
        load_config(ModelSource(id=f"package://somepackage/{file.format(private=tmp_path)}"))
    assert "somepackage" not in sys.modules


def test_a_cache_from_the_hub_loads_as_before(model: Path, hub: Hub) -> None:
    """An honest repository with an index: its shards and nothing else."""
    files = files_of(model)
    files[INDEX] = index("part.safetensors", model)
    files["part.safetensors"] = files.pop(WEIGHTS)
    hub.add_repo("org/honest", files)
    loaded, local = load_model(ModelSource(id="org/honest")), load_model(ModelSource(id=str(model)))
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
    assert Path(loaded.config.name_or_path).is_relative_to(constants.HF_HUB_CACHE)


def test_errors_are_for_people(model: Path) -> None:
    """A name with escape sequences is printed without them."""
    (model / INDEX).write_bytes(index("/x\x1b[2J\u202e.safetensors", model))
    with pytest.raises(LLMPruneError) as caught:
        load_model(ModelSource(id=str(model)))
    assert str(caught.value).isprintable()
