"""Prediction heads are kept where their layer can follow the cut, and a plain load of the result stays clean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.base_models import config_of, edit, prune
from helpers.commands import save_model, verify_here, write_text
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3PreTrainedModel
from transformers.modeling_layers import MtpModel

from llmprune.anatomy.config_edits import count_heads_again, edit_config
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.head_tensors import find_head_tensors
from llmprune.checkpoint.result.config_file import ConfigChange
from llmprune.checkpoint.weight_headers import headers_of_folder
from llmprune.cut.prediction_heads import HeadsDecision, decide_heads

HIDDEN, WEAK_EXPERT, WEAK_NEURONS = 32, 2, 16  # units of the head whose weights are zero
NORMS = {"enorm.weight": HIDDEN, "hnorm.weight": HIDDEN, "shared_head.norm.weight": HIDDEN}


def with_head(folder: Path, family: str, prefix: str, *, extra: Mapping[str, Tensor]) -> Path:
    """Save a tiny model with a head in its file: a copy of the last layer, with some weak units, and ``extra``."""
    save_model(folder, family)
    tensors, last = load_file(folder / "model.safetensors"), "model.layers.3."
    head = {prefix + name.removeprefix(last): one.clone() for name, one in tensors.items() if name.startswith(last)}
    for name, tensor in head.items():
        if f".experts.{WEAK_EXPERT}." in name:
            tensor.zero_()
        elif ".experts." in name:
            (tensor[:, :WEAK_NEURONS] if "down_proj" in name else tensor[:WEAK_NEURONS]).zero_()
    save_file(tensors | head | dict(extra), folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", num_nextn_predict_layers=1)
    return folder


def test_a_head_follows_a_cut_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a cut of layers, neurons, heads and experts transformers loads the head and drafts with it."""
    verify_here(monkeypatch)
    ones = torch.ones(HIDDEN)
    extra = {"mtp.fc.weight": torch.randn(HIDDEN, 2 * HIDDEN), "mtp.norm.weight": ones}
    extra |= {f"mtp.pre_fc_norm_{name}.weight": ones.clone() for name in ("embedding", "hidden")}
    base = with_head(tmp_path / "base", "mellum", "mtp.layers.0.", extra=extra)
    edit(base / "config.json", mtp_layer_types=["full_attention"], mtp_mlp_layer_types=["sparse"])
    write_text(tmp_path / "text.txt")
    width = {"neurons": {"moe_intermediate_size": 32}, "heads": 1}
    report = prune(tmp_path, base, tmp_path, depth={"remove": 1}, width=width, experts={"keep": 3}, refit=False)
    heads, result = report.prediction_heads, tmp_path / "run" / "model"
    assert heads is not None
    assert (heads.fields, heads.narrowed, heads.reason) == (("num_nextn_predict_layers",), True, None)
    assert sum("acceptance" in one or "was not measured" in one for one in report.warnings) == 1
    assert config_of(result)["num_nextn_predict_layers"] == 1
    saved = load_file(result / "model.safetensors")
    assert torch.equal(saved["mtp.fc.weight"], extra["mtp.fc.weight"])
    experts = [tensor for name, tensor in saved.items() if name.startswith("mtp.") and ".experts." in name]
    assert len(experts) == 9
    assert all(tensor.shape == (32, 32) and bool((tensor != 0).any(1).all()) for tensor in experts)
    model, found = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not any(found.values())
    assert MtpModel.from_pretrained(model).num_mtp_layers == 1
    ids = torch.arange(8)[None]
    plain, drafted = (model.generate(ids, max_new_tokens=6, do_sample=False, use_mtp=mtp) for mtp in (None, True))
    assert torch.equal(plain, drafted)


@pytest.fixture(scope="module")
def appended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of four layers with a head as its fifth, as DeepSeek-V3 has it."""
    extra = {f"model.layers.4.{name}": torch.ones(size) for name, size in NORMS.items()}
    extra["model.layers.4.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN)
    return with_head(tmp_path_factory.mktemp("appended") / "base", "deepseek_v3", "model.layers.4.", extra=extra)


def decided(
    folder: Path,
    *,
    layers: tuple[int, ...] = (0, 1, 2, 3),
    narrowed: bool = False,
    keep: bool = True,
    spoil: Mapping[str, str] | None = None,
) -> HeadsDecision:
    """Return what becomes of the head of a model. ``spoil``: other types of tensors, "" for none."""
    before = AutoConfig.from_pretrained(folder)
    headers = dict(headers_of_folder(folder, "base"))
    for name, dtype in (spoil or {}).items():
        stored = headers.pop(f"model.layers.4.{name}")
        headers |= {f"model.layers.4.{name}": replace(stored, dtype=dtype)} if dtype else {}
    after = count_heads_again(edit_config(before, layers, widths={}), before)
    change = ConfigChange(folder, before, after, layers, False, heads=True)
    found = decide_heads(FileNames(build_meta_model(before), headers), change=change, narrowed=narrowed, keep=keep)
    assert found is not None
    return found


def test_an_appended_head_stays_where_transformers_ignores_it(appended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families name the head's index in their code: after a cut of layers the load would complain of another one."""
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4\..*"])
    assert decided(appended).kept
    narrowed = decided(appended, narrowed=True)
    (layer,) = narrowed.layers
    assert (narrowed.kept, layer.prefix, layer.template) == (True, "model.layers.4.", 3)
    assert "model.layers.4.eh_proj.weight" not in layer.names
    shallower = decided(appended, layers=(0, 1, 3))
    assert shallower.reason is not None
    assert "model.layers.3." in shallower.reason
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\..*"])
    assert decided(appended, layers=(0, 1, 3)).kept
    assert narrowed.tensors.renamed("model.layers.4.eh_proj.weight", 3) == "model.layers.3.eh_proj.weight"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": False}, "export.prediction_heads is drop"),
        ({"spoil": {"eh_proj.weight": "F8_E4M3"}}, "quantised"),
        ({"narrowed": True, "spoil": {"mlp.gate.weight": ""}}, "not built like a layer of the decoder"),
    ],
)
def test_a_head_that_cannot_follow_has_a_reason(
    appended: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], said: str
) -> None:
    """A dropped head, a quantised one, and one whose layer differs from all layers of the decoder."""
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4\..*"])
    found = decided(appended, **options)  # type: ignore[arg-type]
    assert found.reason is not None
    assert said in found.reason


def test_tensors_that_are_no_heads_are_left_alone() -> None:
    """Other tensors that transformers ignores, such as those of a vision tower, are not copied."""
    config = AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=1, vocab_size=64)
    model = build_meta_model(config)
    model._keys_to_ignore_on_load_unexpected = {"visual", "rotary"}
    names = FileNames(model, {})
    names._unused += ["model.visual.blocks.3.weight", "model.layers.0.self_attn.rotary.weight"]
    assert find_head_tensors(names) is None
