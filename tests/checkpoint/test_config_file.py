"""The pruned model's config.json: the base's file with only the cut's changes, and without prediction heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.base_models import config_of, edit, prune
from helpers.commands import save_model, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PretrainedConfig

from llmprune import Recipe
from llmprune.anatomy.config_edits import edit_config
from llmprune.checkpoint.converted.gguf import _spell_for_transformers_4
from llmprune.checkpoint.result.config_file import ConfigChange, edited_config, write_config
from llmprune.planning.plan import make_plan
from llmprune.testing import tiny_config

pytestmark = pytest.mark.usefixtures("quick_verification")


def test_cutting_nothing_does_not_change_the_config_file(made: Path, base: Path, tmp_path: Path) -> None:
    """The file is equal byte for byte, and no generation config is added."""
    raw = config_of(base)
    theta = raw.pop("rope_parameters")["rope_theta"]
    text = json.dumps({"rope_theta": theta, "torch_dtype": raw.pop("dtype")} | raw, indent=7)
    (base / "config.json").write_text(text)
    (base / "generation_config.json").unlink()
    prune(made, base, tmp_path, depth=None, width=None)
    result = tmp_path / "run" / "model"
    assert (result / "config.json").read_text() == text
    assert not (result / "generation_config.json").exists()
    dense, same = (load_file(folder / "model.safetensors") for folder in (base, result))
    assert dense.keys() == same.keys()
    assert all(torch.equal(dense[name], same[name]) for name in dense)


def test_weights_are_read_from_the_file_that_the_config_names(made: Path, base: Path, tmp_path: Path) -> None:
    """The result has the usual file name, and its config names none."""
    (base / "model.safetensors").rename(base / "other.safetensors")
    edit(base / "config.json", transformers_weights="other.safetensors")
    prune(made, base, tmp_path)
    assert "transformers_weights" not in config_of(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_config_file_in_the_older_spelling_gives_no_warnings(
    made: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning reads no deprecated field, of which transformers would warn."""
    warned: list[str] = []
    raw = config_of(base)
    raw["torch_dtype"] = raw.pop("dtype")
    (base / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr("transformers.configuration_utils.logger.warning_once", warned.append)
    make_plan(Recipe.load(write_recipe(tmp_path / "recipe.yaml", base, made / "text.txt")))
    assert not warned


def test_another_dtype_is_written_in_the_spelling_of_the_base(base: Path, tmp_path: Path) -> None:
    """The dtype of the weights replaces the base's value; a file without a dtype gets none."""
    raw = config_of(base)
    del raw["dtype"]
    for name, fields in (("old", {"torch_dtype": "float32"}), ("none", {})):
        (base / "config.json").write_text(json.dumps(raw | fields))
        config = AutoConfig.from_pretrained(base)
        change = ConfigChange(base, config, edit_config(config, (0, 2), widths={}), (0, 2), False)
        (tmp_path / name).mkdir()
        write_config(change, tmp_path / name, architecture="LlamaForCausalLM", dtype=torch.bfloat16)
        written = {key: value for key, value in config_of(tmp_path / name).items() if "dtype" in key}
        assert written == dict.fromkeys(fields, "bfloat16")


HEAD = {"mtp.layers.0.self_attn.q_proj.weight": torch.ones(32, 32), "mtp.fc.weight": torch.ones(32, 64)}


def with_head(folder: Path, family: str, **fields: Any) -> Path:
    """Save a model with the tensors of a prediction head in its file, which these config fields count."""
    save_model(folder, family)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | HEAD, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", **fields)
    return folder


@pytest.mark.parametrize(
    ("cut", "fields"),
    [
        ({"depth": {"layers": [1]}, "export": {"prediction_heads": "drop"}}, {"mtp_num_hidden_layers": 1}),
        ({"width": {"mlp": 0.7}}, {"num_nextn_predict_layers": 1}),
        ({"experts": {"keep": 2}}, {"num_mtp_modules": 1, "use_mtp": True}),
        ({"sparsity": {"pattern": 0.5}, "export": {"prediction_heads": "drop"}}, {"mtp_depth_of_draft": 1}),
    ],
    ids=["depth", "width", "experts", "sparsity"],
)
def test_no_config_declares_a_head_that_is_not_saved(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Fields that count a head without a whole layer, or one that is dropped, are zero or False after any cut."""
    monkeypatch.setattr(
        LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."]
    )  # as of families with heads
    base = with_head(tmp_path / "base", "qwen3_next" if "experts" in cut else "llama", **fields, mtp_hidden_size=32)
    report = prune(made, base, tmp_path, **{"depth": None, "width": None} | cut)
    written = config_of(tmp_path / "run" / "model")
    assert {name: written[name] for name in fields} == {name: type(value)(0) for name, value in fields.items()}
    assert written["mtp_hidden_size"] == 32
    assert not [name for name in load_file(tmp_path / "run" / "model" / "model.safetensors") if "mtp" in name]
    warnings = [warning for warning in report.warnings if "predict further tokens" in warning]
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in fields)


def edited(folder: Path, config: PretrainedConfig, keep: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    """Return the fields of a config file after a cut. ``fields``: set in the file before it; None removes a field."""
    config.save_pretrained(folder)
    raw = {name: value for name, value in (config_of(folder) | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    before = AutoConfig.from_pretrained(folder)
    return edited_config(ConfigChange(folder, before, edit_config(before, keep, widths={}), keep, False))


def test_a_text_with_a_letter_for_each_layer_loses_letters(tmp_path: Path) -> None:
    """The number of layers is edited too, although the class derives it from the text."""
    fields = {"hybrid_override_pattern": "M*-E", "num_hidden_layers": 4, "layers_block_type": None}
    written = edited(tmp_path, tiny_config("nemotron_h"), (0, 1, 3), **fields)
    assert (written["hybrid_override_pattern"], written["num_hidden_layers"]) == ("M*E", 3)
    assert "layers_block_type" not in written


def test_lists_that_go_on_for_prediction_heads_end_with_the_layers(tmp_path: Path) -> None:
    """Entries for removed heads are removed, so that the class accepts the file."""
    config = tiny_config("step3p7")
    text = config.text_config.to_dict()
    text |= {"num_nextn_predict_layers": 1, "layer_types": [*text["layer_types"], "full_attention"]}
    count = text["num_hidden_layers"]
    written = edited(tmp_path, config, tuple(range(count)), text_config=text)["text_config"]
    assert (written["num_nextn_predict_layers"], len(written["layer_types"])) == (0, count)


def test_a_packaged_model_is_written_for_older_versions_too(base: Path) -> None:
    """The config has the fields of both versions, and the tokenizer a class that both have."""
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    edit(base / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0})
    edit(base / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<|end|>"])
    _spell_for_transformers_4(base)
    written = config_of(base)
    assert (written["rope_theta"], written["rope_scaling"]) == (77.0, {"rope_type": "linear", "factor": 2.0})
    assert written["torch_dtype"] == "float32"
    assert AutoConfig.from_pretrained(base).rope_parameters == written["rope_parameters"]
    assert AutoConfig.from_pretrained(base).hidden_size == config.hidden_size
    assert json.loads((base / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(base)
    assert again("fox <|end|>")["input_ids"] == tokenizer("fox <|end|>")["input_ids"]
