"""Every tensor is saved in the type that its file has, and reported sizes are those of the files."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import verify_here
from helpers.decoders import dense_decoder
from helpers.families import MIXTURES
from helpers.hub.published import files_of
from helpers.hub.server import Hub
from helpers.tiny import structure_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.anatomy.meta_model import build_meta_model
from llmprune.checkpoint.disk_offload import offload_folder
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.weight_headers import headers_of_folder
from llmprune.checkpoint.weights_reader import WeightsReader
from llmprune.pipeline.run import run
from llmprune.planning.plan_schema import Plan
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.results.report_schema import Report
from llmprune.testing import VOCABULARY, tiny_model

IN_FLOAT32 = {"qwen3_next": ("A_log", "dt_bias", "gate.weight"), "deepseek_v3": ("e_score_correction_bias", "gate.")}


def _mixed(folder: Path, family: str, wide: Callable[[str], bool], **fields: Any) -> dict[str, Tensor]:
    """Save a bfloat16 checkpoint with some float32 tensors that bfloat16 cannot represent; return its tensors."""
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    stored = {
        name: torch.rand(tensor.shape, generator=random) / 8 if wide(name) else tensor
        for name, tensor in stored.items()
    }
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return stored


def _recipe(folder: Path, sections: str = "", model: str = "") -> Recipe:
    ids = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder.parent / "ids.safetensors")
    shape = "samples: 4, sequence_length: 24, self_generated: 0"
    tokens = f"{{tokens: '{folder.parent}/ids.safetensors', key: input_ids, {shape}}}"
    text = f"model: {{id: '{folder}'{model}}}\ncalibration: {tokens}\nevaluation: {{perplexity: null}}\n{sections}"
    return Recipe.parse(text)


def _run(folder: Path, sections: str = "", model: str = "") -> tuple[Plan, Report, dict[str, Tensor]]:
    recipe = _recipe(folder, sections, model)
    report = run(recipe, folder.parent / "run")
    plan = Plan.model_validate_json((folder.parent / "run" / "plan.json").read_text())
    return plan, report, load_file(folder.parent / "run" / "model" / "model.safetensors")


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("family", IN_FLOAT32)
def test_a_cut_of_nothing_leaves_a_mixed_checkpoint_bit_equal(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decays, routers and their biases are saved in float32 in a bfloat16 checkpoint, bit-equal."""
    verify_here(monkeypatch)
    stored = _mixed(tmp_path / "base", family, lambda name: any(part in name for part in IN_FLOAT32[family]))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    plan, report, saved = _run(tmp_path / "base")
    assert saved.keys() == stored.keys()
    assert all(_same(saved[name], stored[name]) for name in stored)
    assert any("files mix types" in warning for warning in report.warnings)
    assert report.pruned == report.dense == plan.dense == plan.pruned


def test_kept_parts_of_float32_tensors_are_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept rows and experts of float32 routers and experts equal those of the file, although memory stacks them."""
    verify_here(monkeypatch)
    stored = _mixed(tmp_path / "base", "qwen3_moe", lambda name: ".mlp." in name)
    plan, _, saved = _run(tmp_path / "base", "depth: {layers: [1]}\nexperts: {keep: 3}\nrefit: false\n")
    cut = load_file(tmp_path / "run" / "cut.safetensors")
    for new, old in enumerate((0, 2, 3)):
        experts = cut[f"experts.{old}.mlp.experts"].tolist()
        before, after = f"model.layers.{old}.mlp", f"model.layers.{new}.mlp"
        assert _same(saved[f"{after}.gate.weight"], stored[f"{before}.gate.weight"][experts])
        for kept, expert in enumerate(experts):
            name = "up_proj.weight"
            assert _same(saved[f"{after}.experts.{kept}.{name}"], stored[f"{before}.experts.{expert}.{name}"])
    assert plan.pruned.bytes == _bytes(saved)


def test_refit_tensors_are_saved_in_the_type_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bfloat16 config and float32 files, the run computes in bfloat16 and saves float32."""
    verify_here(monkeypatch)
    stored = _mixed(tmp_path / "base", "llama", lambda _: True)
    plan, report, saved = _run(tmp_path / "base", "width: {neurons: 64}\nrefit: {ridge: 0.1}\n")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert _same(saved["model.layers.0.self_attn.q_proj.weight"], stored["model.layers.0.self_attn.q_proj.weight"])
    assert plan.dtype == "bfloat16"
    assert plan.dense.bytes == report.dense.bytes == _bytes(stored)
    assert plan.disk == plan.pruned.bytes == report.pruned.bytes == _bytes(saved)


def test_a_type_in_the_recipe_converts_what_transformers_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``model.dtype`` converts float32 tensors, with a note in the plan, except those that the class keeps float32."""
    verify_here(monkeypatch)
    _mixed(tmp_path / "base", "deepseek_v3", lambda name: "e_score" in name or "gate." in name)
    plan, report, saved = _run(tmp_path / "base", "", ", dtype: bfloat16")
    kept = {name for name, tensor in saved.items() if tensor.dtype == torch.float32}
    assert kept
    assert all("e_score_correction_bias" in name for name in kept)
    assert any(note.startswith("model.dtype: bfloat16 converts tensors of the files") for note in plan.notes)
    parameters = {name: tensor for name, tensor in saved.items() if "e_score" not in name}
    assert plan.pruned.bytes == report.pruned.bytes == _bytes(parameters)


def test_sizes_are_those_of_the_files_where_the_config_names_no_type(hub: Hub, tmp_path: Path) -> None:
    """The sizes of a folder and of a repository are equal; only headers are downloaded."""
    stored = _mixed(tmp_path / "base", "llama", lambda _: False, dtype=None)
    hub.add_repo("org/base", files_of(tmp_path / "base"))
    for name in (str(tmp_path / "base"), "org/base"):
        plan = structure_of(Recipe.parse(f"model: {{id: '{name}'}}\ncalibration: {{dataset: t.txt}}\n"))
        assert (plan.dtype, plan.dense.bytes, plan.pruned.bytes) == ("bfloat16", _bytes(stored), _bytes(stored))
    ranges = [line for line in hub.lines if line.startswith("GET /cdn/") or "safetensors" in line]
    assert ranges, "the header was fetched"
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))


@pytest.mark.parametrize("family", [*MIXTURES, "gpt2", "phi3", "lfm2", "mamba"])
def test_tensors_of_the_files_are_found_for_every_family(family: str, tmp_path: Path) -> None:
    """Tensors read one by one equal those that transformers loads, renamed, stacked or joined."""
    tiny_model(family).save_pretrained(tmp_path)
    model = load_model(ModelSource(id=str(tmp_path)))
    names = FileNames(build_meta_model(model.config, model.dtype), headers_of_folder(tmp_path, "it"))
    loaded = {name: tensor for name, tensor in model.state_dict().items() if names.sources(name)}
    untied = {name for name, _ in model.named_parameters()}
    assert untied - loaded.keys() <= model.all_tied_weights_keys.keys()
    read = WeightsReader(names, tmp_path, shown=family).read(loaded)
    assert all(_same(read[name], tensor) for name, tensor in loaded.items())


def test_a_mixture_is_read_with_a_part_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that transformers stacks are stored in a folder of the run, which is deleted with the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    whole = dense_decoder(load_model(ModelSource(id=str(tmp_path / "base"))))
    model = load_model(ModelSource(id=str(tmp_path / "base"), max_memory={"cpu": 60_000}))
    assert any(parameter.is_meta for parameter in model.parameters())
    decoder = dense_decoder(model)
    for index in range(len(whole)):
        found, expected = decoder.tensors(index), whole.tensors(index)
        assert found.keys() == expected.keys()
        assert all(_same(found[name], expected[name]) for name in expected)
    offloaded = tmp_path / "home" / "llmprune" / "offload"
    assert list(offloaded.rglob("*.safetensors"))
    del model, decoder, whole
    gc.collect()
    assert not list(offloaded.rglob("*.safetensors"))


def test_offload_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a locked lock file is removed; that of a running process is kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    mine = offload_folder()
    left = mine.parent / "left"
    left.mkdir()
    left.with_suffix(".lock").touch()
    other = offload_folder()
    assert not left.exists()
    assert mine.is_dir()
    assert other != mine
