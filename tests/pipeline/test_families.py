"""One contract for every family: found, proven, cut, saved, and reloaded by plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import prune_and_save
from helpers.commands import states
from helpers.decoders import dense_decoder
from helpers.devices import simulated_devices
from helpers.families import (
    DEPTH_AND_WIDTH,
    DEPTH_ONLY,
    DISTINCT,
    FIELDS,
    KEPT_LAYERS,
    KEPT_WIDTHS,
    MIXTURES,
    RELOAD,
    REMOVED,
    WHOLE_HEADS,
)
from helpers.placements import spread
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.meta_model import text_config
from llmprune.anatomy.selection import mask_neurons
from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.model import ModelSource
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model


@dataclass
class Case:
    """One family, pruned by a third in depth and (where it can be) in width, to half its attention heads, and refit."""

    model: PreTrainedModel
    anatomy: Anatomy
    cut: Cut
    ids_NL: Tensor
    logits_NLV: Tensor  # that pass 2 ended with
    folder: Path


def _prune(model: PreTrainedModel, anatomy: Anatomy, *, dense: Decoder, folder: Path) -> Case:
    ids_NL = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    scores = score(
        dense,
        anatomy,
        criteria=ScoringCriteria(depth=BlockInfluence(), width=Activation(), heads=Activation()),
        calibration=CalibrationBatches(ids_NL, 4),
    )
    widths = {field: KEPT_WIDTHS[width] for field, width in anatomy.widths.items()}
    kv_groups = anatomy.heads.count // 2 if anatomy.heads and anatomy.heads.refusal is None else None
    removed = REMOVED.get(model.config.model_type)
    cut = choose_cut(anatomy, scores, sizes=PlannedSizes(removed, KEPT_LAYERS, widths=widths, kv_groups=kv_groups))
    folder.mkdir()
    _, forward = prune_and_save(model, anatomy, dense=dense, cut=cut, ids_NL=ids_NL, folder=folder)
    save_file({"ids": ids_NL}, folder / "ids.safetensors")
    return Case(model, anatomy, cut, ids_NL, forward.logits(0), folder)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every family pruned here, then all reloaded by one fresh process."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    for family in DEPTH_AND_WIDTH + MIXTURES + DEPTH_ONLY:
        model = tiny_model(family, **FIELDS.get(family, {}))
        made[family] = _prune(model, discover(model.config), dense=dense_decoder(model), folder=root / family)
    folders = [str(root / family) for family in made]
    done = subprocess.run([sys.executable, "-P", "-c", RELOAD, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.mark.parametrize("family", DEPTH_AND_WIDTH + MIXTURES + DEPTH_ONLY)
def test_reload_equals_memory(family: str, cases: dict[str, Case]) -> None:
    """Plain transformers gives the very logits that pass 2 ended with, and no key differs."""
    case = cases[family]
    reloaded = json.loads((case.folder / "reloaded.json").read_text())
    logits_NLV = load_file(case.folder / "logits.safetensors")["logits"]
    assert reloaded["keys"] == {}
    assert torch.equal(logits_NLV, case.logits_NLV)
    assert reloaded["cached"] == reloaded["uncached"]


@pytest.mark.parametrize("family", [*DISTINCT, "mamba", "bloom"])
def test_a_split_model_is_pruned_alike(family: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """Of layers on two devices, on the CPU and on disk the cut, the logits and all files are those of the CPU."""
    case = cases[family]
    case.model.save_pretrained(tmp_path / "base")
    with simulated_devices(2):
        dense = open_decoder(ModelSource(id=str(tmp_path / "base"), device_map=spread(tmp_path / "base")))
        found = _prune(case.model, case.anatomy, dense=dense, folder=tmp_path / "split")
        assert {dense.device_of(index).index for index in range(len(dense))} == {0, 1}
        assert found.logits_NLV.is_cuda
        assert torch.equal(found.logits_NLV.cpu(), case.logits_NLV)
    files, expected = (states(folder / "checkpoint") for folder in (found.folder, case.folder))
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []


@pytest.mark.parametrize("family", DEPTH_AND_WIDTH + MIXTURES)
def test_cut_equals_mask(family: str, cases: dict[str, Case]) -> None:
    """Neurons and heads removed or zeroed, layers removed or skipped: the logits are the same."""
    case = cases[family]
    dense = dense_decoder(case.model)
    cut = cut_decoder(dense, anatomy=case.anatomy, cut=case.cut)
    removed, masked = (
        LayerwiseForward(cut, case.ids_NL, batch_size=4),
        LayerwiseForward(dense, case.ids_NL, batch_size=4),
    )
    for new, old in enumerate(case.cut.layers):
        with cut.layer(new) as layer:
            removed.pass_through(new, layer)
        with dense.layer(old) as layer:
            for unit in case.anatomy.units[old]:
                weight = layer.get_parameter(unit.tensors[-1].name)
                weight.data = mask_neurons(
                    weight.data, unit.tensors[-1], keep=case.cut.neurons[unit_key(old, unit.path)]
                )
            attention = case.anatomy.attention[old]
            if attention is not None:
                weight, heads = layer.get_parameter(attention.tensors[-1].name), case.cut.heads
                keep_G = heads[unit_key(old, attention.path)]
                weight.data = mask_neurons(weight.data, attention.tensors[-1], keep=keep_G)
            masked.pass_through(old, layer)
    torch.testing.assert_close(removed.logits(0), masked.logits(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DEPTH_AND_WIDTH + MIXTURES)
def test_width_is_proven(family: str, cases: dict[str, Case]) -> None:
    """The widths are found, and the saved config holds the new ones in the fields that were proven."""
    case = cases[family]
    config = json.loads((case.folder / "checkpoint" / "config.json").read_text())
    assert case.anatomy.width_refusal is None
    assert case.anatomy.widths
    assert {field: config[field] for field in case.anatomy.widths} == case.cut.widths


@pytest.mark.parametrize("family", DEPTH_AND_WIDTH + MIXTURES + DEPTH_ONLY)
def test_heads_are_proven_or_refused_with_a_reason(family: str, cases: dict[str, Case]) -> None:
    """The saved config counts half the heads, of the size that they had; or the anatomy says why it cannot."""
    case = cases[family]
    heads, config = case.anatomy.heads, json.loads((case.folder / "checkpoint" / "config.json").read_text())
    if family in WHOLE_HEADS or heads is None:
        assert family == "mamba" or (heads and heads.refusal and WHOLE_HEADS[family] in heads.refusal)
        assert not any(case.anatomy.attention)
        return
    assert case.cut.heads
    fields = heads.fields(heads.count // 2)
    assert {name: config[name] for name in fields} == fields
    assert getattr(text_config(case.model.config), "head_dim", 8) == config.get("head_dim", 8)


@pytest.mark.parametrize("family", DEPTH_ONLY)
def test_width_is_refused_with_a_reason(family: str, cases: dict[str, Case]) -> None:
    """Where no narrower model could be reloaded, the anatomy says why."""
    anatomy = cases[family].anatomy
    assert not anatomy.widths
    assert anatomy.width_refusal


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "opt", "jamba"])
def test_cutting_nothing_changes_nothing(family: str, tmp_path: Path) -> None:
    """An empty cut writes every tensor of the dense model bit for bit, refit or not."""
    model = tiny_model(family)
    anatomy = discover(model.config)
    dense = dense_decoder(model)
    cut = Cut(len(dense), tuple(range(len(dense))))
    ids_NL = torch.randint(3, VOCABULARY, (4, 16))
    prune_and_save(model, anatomy, dense=dense, cut=cut, ids_NL=ids_NL, folder=tmp_path, max_shard_size=10**9)
    model.save_pretrained(tmp_path / "dense")
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint", "dense"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_layerwise_forward_equals_forward() -> None:
    """Walking layer by layer gives the logits of the model's own forward, to the bit."""
    model = tiny_model("gemma3_text")
    dense = dense_decoder(model)
    ids_NL = torch.randint(3, VOCABULARY, (5, 40))
    forward = LayerwiseForward(dense, ids_NL, batch_size=2)
    for index in range(len(dense)):
        with dense.layer(index) as layer:
            forward.pass_through(index, layer)
    with torch.no_grad():
        for batch, ids_BL in enumerate(forward.batches):
            assert torch.equal(forward.logits(batch), model(ids_BL, use_cache=False).logits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_in_files_equal_those_in_memory(family: str, tmp_path: Path) -> None:
    """Layers that are read from the files when they are visited are run and cut like those in memory, to the bit."""
    tiny_model(family).save_pretrained(tmp_path)
    source = ModelSource(id=str(tmp_path))
    ids_NL = torch.randint(3, VOCABULARY, (4, 16))
    logits = []
    for dense in (dense_decoder(load_model(source)), open_decoder(source)):
        anatomy = discover(dense.skeleton.config)
        unit = anatomy.units[0][0]
        kept = torch.arange(64) if unit.experts is None else torch.arange(64).repeat(unit.experts, 1)
        cut = Cut(4, (0, 1, 3), {unit.field: 64}, {unit_key(index, unit.path): kept for index in range(4)})
        pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
        _, forward = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(), write=lambda *_: None).run(
            ids_NL, 2
        )
        logits.append(forward.logits(0))
    assert torch.equal(logits[0], logits[1])
