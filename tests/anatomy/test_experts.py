"""Mixtures of experts: neurons of experts and whole experts are removed, or refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import prune_and_save
from helpers.commands import command, save_model, verify_here, write_recipe, write_text
from helpers.decoders import dense_decoder
from helpers.families import GROUPED, MIXTURES, RELOAD
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.expert_hooks import activations_of_experts, outputs_of_experts
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.selection import mask_neurons, select_neurons
from llmprune.anatomy.types import Anatomy, PrunableDim, unit_key
from llmprune.common.errors import ModelError
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_config, cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_config, tiny_model

OVERRIDES: dict[str, dict[str, Any]] = {"glm4_moe": GROUPED}
REMOVABLE = [*(family for family in MIXTURES if family != "llama4_text"), *OVERRIDES]
# Families that compute routing weights from the chosen experts alone, so that the weights do not change when others are
# removed. In other families the softmax runs over all experts.
CHOSEN_ALONE = ["mixtral", "deepseek_v3", "gpt_oss", "granitemoehybrid", "nemotron_h", "glm4_moe"]
IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


def _scored(family: str) -> tuple[Any, Anatomy, Decoder, Scores]:
    model = tiny_model(family, **OVERRIDES.get(family, {}))
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(4)) / 10)
    anatomy = discover(model.config)
    dense = dense_decoder(model)
    return (
        model,
        anatomy,
        dense,
        score(
            dense,
            anatomy,
            criteria=ScoringCriteria(depth=BlockInfluence(), width=Activation(), experts=Reap()),
            calibration=CalibrationBatches(IDS, 4),
        ),
    )


def _kept(anatomy: Anatomy) -> int:
    """One expert fewer, or in each group one fewer."""
    assert anatomy.experts is not None
    return anatomy.experts.possible[-2]


@pytest.mark.parametrize("count", [2, 3])
def test_small_mixtures_lose_experts_too(count: int) -> None:
    """A mixture of two or three experts is found and proven like a larger one."""
    anatomy = discover(tiny_config("qwen2_moe", num_experts=count, num_experts_per_tok=1))
    assert anatomy.experts is not None
    assert (anatomy.experts.count, anatomy.experts.refusal) == (count, None)


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Anatomy, Cut, Tensor, Path]]:
    """Prune a layer, a third of the neurons and one expert in four of every family; reload all in one fresh process."""
    root = tmp_path_factory.mktemp("experts")
    made = {}
    for family in REMOVABLE:
        folder = root / family
        folder.mkdir()
        model, anatomy, dense, scores = _scored(family)
        widths = {field: width // 3 * 2 for field, width in anatomy.widths.items()}
        cut = choose_cut(anatomy, scores, sizes=PlannedSizes(None, 3, widths=widths, num_experts=_kept(anatomy)))
        _, forward = prune_and_save(model, anatomy, dense=dense, cut=cut, ids_NL=IDS, folder=folder)
        save_file({"ids": IDS}, folder / "ids.safetensors")
        made[family] = (anatomy, cut, forward.logits(0), folder)
    folders = [str(folder) for _, _, _, folder in made.values()]
    done = subprocess.run([sys.executable, "-P", "-c", RELOAD, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.mark.parametrize("family", REMOVABLE)
def test_depth_width_and_experts_reload_exactly(
    family: str, fewer: dict[str, tuple[Anatomy, Cut, Tensor, Path]]
) -> None:
    """After a cut of layers, neurons and experts, plain transformers gives equal logits, and no key differs."""
    anatomy, _, logits_NLV, folder = fewer[family]
    reloaded = json.loads((folder / "reloaded.json").read_text())
    assert reloaded["keys"] == {}
    assert torch.equal(load_file(folder / "logits.safetensors")["logits"], logits_NLV)
    assert reloaded["cached"] == reloaded["uncached"]
    assert anatomy.experts is not None
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert config[anatomy.experts.field] == _kept(anatomy)


@pytest.mark.parametrize("family", CHOSEN_ALONE)
def test_a_removed_expert_equals_one_that_is_never_chosen(family: str) -> None:
    """A model without an expert computes the same as one whose router cannot choose it."""
    _, anatomy, dense, scores = _scored(family)
    cut = choose_cut(anatomy, scores, sizes=PlannedSizes((), anatomy.num_layers, num_experts=_kept(anatomy)))
    cut = Cut(cut.num_layers, cut.layers, {}, {}, cut.num_experts, cut.experts)
    removed, masked = (
        LayerwiseForward(cut_decoder(dense, anatomy=anatomy, cut=cut), IDS, batch_size=4),
        LayerwiseForward(dense, IDS, batch_size=4),
    )
    for index in range(anatomy.num_layers):
        with removed.decoder.layer(index) as layer:
            removed.pass_through(index, layer)
        with dense.layer(index) as layer:
            block = anatomy.blocks[index]
            if block is not None:
                _hide_experts(layer, block.path, cut.experts[unit_key(index, block.path)])
            masked.pass_through(index, layer)
    torch.testing.assert_close(removed.logits(0), masked.logits(0), rtol=1e-4, atol=1e-4)


def _hide_experts(layer: torch.nn.Module, path: str, keep_E: Tensor) -> None:
    """Make the router of the block choose among the kept experts only."""
    holder = layer.get_submodule(path.rpartition(".")[0])
    router = next(getattr(holder, name) for name in ("gate", "router") if hasattr(holder, name))
    hidden_from = torch.full((router.weight.shape[0],), 1e9).index_fill_(0, keep_E, 0.0)
    for bias_E in router.buffers():
        bias_E.data = bias_E - hidden_from.clamp_max(10)
    linear = torch.nn.functional.linear
    forward = router.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        torch.nn.functional.linear = lambda *inputs: linear(*inputs) - hidden_from
        try:
            return forward(*args, **kwargs)
        finally:
            torch.nn.functional.linear = linear

    router.forward = masked


@pytest.mark.parametrize("family", REMOVABLE)
def test_outputs_of_experts_add_up_to_the_output_of_their_block(family: str) -> None:
    """The outputs of single experts sum to the block's output, and each expert's activations are observed."""
    _, anatomy, dense, _ = _scored(family)
    index = next(index for index, block in enumerate(anatomy.blocks) if block)
    unit = next(unit for unit in anatomy.units[index] if unit.experts)
    totals: list[Tensor] = []
    wanted: list[Tensor] = []
    tokens: dict[int, int] = {}
    routed: dict[int, int] = {}
    forward = LayerwiseForward(dense, IDS, batch_size=4)
    with dense.layer(index) as layer:
        module = layer.get_submodule(unit.path)

        def see(module: torch.nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            total_TD = torch.zeros_like(output)
            for part in outputs_of_experts(module, args, kwargs=kwargs, count=unit.experts):
                total_TD.index_add_(0, part.token_T, part.output_TD)
                tokens[part.expert] = len(part.token_T)
            totals.append(total_TD)
            wanted.append(output)

        def note(expert: int, activation_TF: Tensor) -> None:
            assert activation_TF.shape[1] == unit.width
            routed[expert] = len(activation_TF)

        module.register_forward_hook(see, with_kwargs=True)
        with activations_of_experts(module, layer.get_parameter(unit.tensors[-1].name), see=note):
            forward.calls[0][index].run(layer, forward.hidden_states[0])
    torch.testing.assert_close(totals[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert tokens == routed
    assert sum(tokens.values()) == IDS.numel() * 2


def test_reap_is_the_mean_weighted_norm() -> None:
    """The score of an expert is the mean norm of its weighted outputs; 0 without tokens."""
    sums = Reap().make_accumulator(3, torch.device("cpu"))
    sums.update(0, torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    sums.update(0, torch.tensor([[0.0, 0.0]]))
    sums.update(2, torch.tensor([[6.0, 8.0]]))
    assert sums.scores().tolist() == [2.0, 0.0, 10.0]


def test_an_expert_without_tokens_is_scored_by_its_weights() -> None:
    """Neurons of an expert without calibration tokens are ranked by the norm of their output weights."""
    model = tiny_model("mixtral")
    router = model.model.layers[0].mlp.gate
    router.weight.data[3] = -1000 * router.weight.data[:3].sum(0).sign()
    model.model.layers[0].post_attention_layernorm.weight.data.fill_(0.0)  # every token scores 0: the first two win
    anatomy = discover(model.config)
    scores = score(
        dense_decoder(model),
        anatomy,
        criteria=ScoringCriteria(width=Activation()),
        calibration=CalibrationBatches(IDS, 4),
    )
    key = unit_key(0, "mlp.experts")
    assert (scores.routed[key] == 0).any()
    unreached = int((scores.routed[key] == 0).nonzero()[0])
    weight_DF = model.model.layers[0].mlp.experts.down_proj[unreached]
    torch.testing.assert_close(scores.neurons[key][unreached], weight_DF.square().sum(0))


def test_scores_survive_their_file(tmp_path: Path) -> None:
    """Scores of neurons, experts and routing are equal after saving and loading."""
    _, _, _, scores = _scored("mixtral")
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    for kind in ("neurons", "experts", "routed"):
        before, after = getattr(scores, kind), getattr(loaded, kind)
        assert before
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("parts", [(1,), (1, 1), (2,), (1, 2)])
def test_masked_then_selected_is_selected(parts: tuple[int, ...]) -> None:
    """Masking does not change the kept neurons, of each expert its own, and sets the rest to zero."""
    tensor = torch.randn(2, 12, 5)
    keep = torch.tensor([[0, 2], [1, 3]])
    prunable = PrunableDim("weight", 1, parts)
    masked = mask_neurons(tensor, prunable, keep=keep)
    assert torch.equal(select_neurons(masked, prunable, keep=keep), select_neurons(tensor, prunable, keep=keep))
    assert int((masked != 0).any(-1).sum()) == select_neurons(tensor, prunable, keep=keep).shape[1] * 2


def test_other_cuts_are_possible_where_no_expert_can_be_removed() -> None:
    """Layers and widths of such a model are prunable."""
    model = tiny_model("llama4_text")
    anatomy = discover(model.config)
    config = cut_config(model.config, anatomy, kept=KeptSizes((0, 2, 3), {"intermediate_size": 64}, experts=4))
    assert (config.num_hidden_layers, config.intermediate_size, config.num_local_experts) == (3, 64, 4)
    with pytest.raises(ModelError, match="not told which experts"):
        cut_config(model.config, anatomy, kept=KeptSizes((0, 2, 3), experts=3))


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One recipe cuts layers, both widths, heads and experts; cut, report, page and terminal show each of them."""
    verify_here(monkeypatch)
    base = save_model(tmp_path / "base", "qwen2_moe")
    cuts = {"depth": {"remove": 1}, "width": {"mlp": 0.67, "heads": 1}, "experts": {"remove": 1, "method": "merge"}}
    recipe = write_recipe(tmp_path / "recipe.yaml", base, write_text(tmp_path / "text.txt"), **cuts)
    outcome = command("run", recipe, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cut = json.loads((tmp_path / "out" / "cut.json").read_text())
    widths = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    assert {name: config[name] for name in widths} == cut["widths"] == report["pruned"]["widths"] == widths
    assert report["pruned"]["experts"] == cut["num_experts"] == config["num_experts"] == 3
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    assert {name: config[name] for name in heads} == heads
    assert report["pruned"]["kv_groups"] == cut["kv_groups"] == 1
    assert report["pruned"]["kv_bytes_per_token"] * 8 == report["dense"]["kv_bytes_per_token"] * 3
    for layer in report["layers"]:
        assert layer["removed"] or (len(layer["kv_groups_kept"]) == 1 and 0.5 <= layer["kv_groups_share"] < 1)
    assert all(len(layer["experts_kept"]) == 3 for layer in report["layers"] if not layer["removed"])
    assert not any("without refit" in warning for warning in report["warnings"])
    page = (tmp_path / "out" / "report.html").read_text()
    for shown in (
        "1 of 4 experts removed",
        "48 to 32 neurons (moe_intermediate_size)",
        "experts kept",
        "1 of 2 key-value heads removed",
    ):
        assert shown in page
    assert "moe_intermediate_size" in outcome.out
    assert "key-value heads" in outcome.out
    table = command("anatomy", base).out
    for shown in (
        "48 in each of 4 experts in 4 layers",
        "Experts: can be cut",
        "96 in 4 layers (mlp.shared_expert)",
        "4 in 2 key-value groups of 2",
        "Heads: can be cut",
    ):
        assert shown in table.replace("\n", " ")
