"""The result's folder is the base's own, but for its weights: which files come along, and what its config says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import save_model, verify_here, write_recipe, write_text
from helpers.hub.server import Hub
from helpers.small_disks import files_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PretrainedConfig

from llmprune import ModelError, Recipe, Report, run
from llmprune.anatomy.config_edits import edit_config
from llmprune.checkpoint import copied_files as companions
from llmprune.checkpoint.config_file import ConfigChange, edited_config, write_config
from llmprune.checkpoint.copied_files import select_files
from llmprune.checkpoint.gguf import _spell_for_transformers_4
from llmprune.planning.plan import make_plan
from llmprune.testing import tiny_config

TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "extra_special_tokens": {}}
# Files of a base by their paths, with what is in them.
CARRIED: dict[str, str] = {
    "tokenizer.model": "\x00 a sentencepiece model",
    "tokenizer_config.json": json.dumps(TOKENIZER, separators=(",  ", ":")),
    "special_tokens_map.json": '{"eos_token":   "<|end|>"}',
    "generation_config.json": '{"temperature": 0.6,"do_sample": true, "eos_token_id": [2]}',
    "vocab.txt": "a\nb\n",
    "LICENSE": "Do as you like.\n",
    "LICENSES/MIT.txt": "MIT\n",
    "LICENSES/more/Apache-2.0.txt": "Apache\n",
    "USE_POLICY.md": "Be kind.\n",
    "additional_chat_templates/tool.jinja": "{{ messages }}",
    "preprocessor_config.json": '{"size":7}',
    "notes.csv": "a,b\n",
}
LEFT: dict[str, tuple[str, str]] = {
    "pytorch_model.bin.index.json": ("{}", "describes the base's weights"),
    "params.json": ('{"dim": 32, "n_layers": 4}', "describes the base's weights"),
    "exponents.json": ('{"model.layers.0.mlp.up_proj.weight": 3}', "describes the base's weights"),
    "model.safetensors.sha256": ("abc", "describes the base's weights"),
    "modeling_own.py": ("raise SystemExit", "code, which the recipe does not trust"),
    "big.csv": ("x" * 2000, "larger than"),
    "onnx/config.json": ("{}", "lies in a folder of its own"),
}
SILENT = {"README.md": "# A base", "llmprune.json": "{}", ".gitattributes": "x", "model.onnx": "x", "extra.bin": "x"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a text, made once."""
    room = tmp_path_factory.mktemp("made")
    save_model(room / "base")
    write_text(room / "text.txt")
    return room


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """A copy of the model to add to."""
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_here(monkeypatch)


def add(folder: Path, files: dict[str, str]) -> None:
    """Write files, by their paths in a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def prune(made: Path, base: Path | str, folder: Path, **sections: Any) -> Report:
    """Run a recipe; the result lies in ``folder``/run/model."""
    folder.mkdir(parents=True, exist_ok=True)
    return run(Recipe.load(write_recipe(folder / "recipe.yaml", base, made / "text.txt", **sections)), folder / "run")


def config_of(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json."""
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return fields


def test_files_that_are_no_weights_come_along_byte_for_byte(
    made: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizer, settings, templates and licences of any depth do; what describes other weights or is large does not.

    Plan and report list both kinds.
    """
    monkeypatch.setattr(companions, "LARGEST", 1000)
    others = {name: text for name, (text, _) in LEFT.items()} | SILENT
    add(base, CARRIED | others | {"tokenizer.model": "x" * 2000})
    report = prune(made, base, tmp_path)
    plan = make_plan(Recipe.load(tmp_path / "recipe.yaml"))
    result = tmp_path / "run" / "model"
    same = {*CARRIED, "tokenizer.json", "chat_template.jinja"}
    assert set(files_of(result)) == same | {"config.json", "model.safetensors"}
    assert {name: (result / name).read_bytes() for name in same} == {name: (base / name).read_bytes() for name in same}
    assert plan.base_files == report.base_files
    assert set(report.base_files.carried) == same
    listed = {name.replace("onnx", "onnx/config.json"): why for name, why in report.base_files.left.items()}
    assert listed.keys() == LEFT.keys()
    assert all(why in listed[name] for name, (_, why) in LEFT.items())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "tokenizer.model" in page
    assert "modeling_own.py (code, which the recipe does not trust)" in page


def test_odd_entries_never_stop_a_run(made: Path, base: Path, tmp_path: Path) -> None:
    """A pipe, a broken link and folders in place of files are left behind, and the plan says so."""
    (base / "LICENSES").mkdir()
    os.mkfifo(base / "NOTICE")
    os.mkfifo(base / "LICENSES" / "pipe")
    (base / "LICENSE").symlink_to("nowhere")
    (base / "USE_POLICY").mkdir()
    (base / "tokenizer.model").mkdir()
    found = select_files(base, trusted=False)
    assert {"NOTICE", "LICENSES/pipe", "LICENSE", "USE_POLICY", "tokenizer.model"} == found.left.keys()
    prune(made, base, tmp_path, width=None)
    assert not [path for path in (tmp_path / "run" / "model").iterdir() if path.name.startswith(("LIC", "NOT", "USE"))]


def test_a_link_out_of_the_folder_is_never_copied(base: Path, tmp_path: Path) -> None:
    """What nobody reads while it is pruned, such as a picture, is no way to have a file of the machine copied."""
    (tmp_path / "secret").write_text("secret")
    (base / "figure.png").symlink_to(tmp_path / "secret")
    (base / "inside.png").symlink_to("config.json")
    found = select_files(base, trusted=False)
    assert found.left == {"figure.png": "a link that leads out of the model's folder"}
    assert "inside.png" in found.carried


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_said_by_the_plan(made: Path, base: Path, tmp_path: Path) -> None:
    """Before weights are read, with the remedy."""
    (base / "LICENSE").write_text("x")
    (base / "LICENSE").chmod(0)
    with pytest.raises(ModelError, match=r"LICENSE of the base model comes along .* make it readable"):
        prune(made, base, tmp_path)


def test_cutting_nothing_leaves_the_config_file_as_it_is(made: Path, base: Path, tmp_path: Path) -> None:
    """To the byte, in whatever order and spelling, and without a generation config that the base does not have."""
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


def test_weights_under_a_name_of_their_own_are_read_throughout(made: Path, base: Path, tmp_path: Path) -> None:
    """Where the config names the weights file, the run reads it; the result has the usual name and names none."""
    (base / "model.safetensors").rename(base / "other.safetensors")
    edit(base / "config.json", transformers_weights="other.safetensors")
    prune(made, base, tmp_path)
    assert "transformers_weights" not in config_of(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_plan_of_a_file_in_the_older_spelling_brings_no_warnings(
    made: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Editing the config reads no deprecated field, of which transformers would warn above the plan."""
    warned: list[str] = []
    raw = config_of(base)
    raw["torch_dtype"] = raw.pop("dtype")
    (base / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr("transformers.configuration_utils.logger.warning_once", warned.append)
    make_plan(Recipe.load(write_recipe(tmp_path / "recipe.yaml", base, made / "text.txt")))
    assert not warned


def test_another_dtype_is_written_in_the_spelling_of_the_base(base: Path, tmp_path: Path) -> None:
    """The recipe's dtype replaces the base's value; a base that names none still names none."""
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


# ---- heads that predict further tokens

HEAD = {"mtp.layers.0.self_attn.q_proj.weight": torch.ones(32, 32), "mtp.fc.weight": torch.ones(32, 64)}


def with_head(folder: Path, family: str, **fields: Any) -> Path:
    """A model whose file has the tensors of a prediction head, and whose config counts it in these fields."""
    save_model(folder, family)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | HEAD, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", **fields)
    return folder


@pytest.mark.parametrize(
    ("cut", "fields"),
    [
        ({"depth": {"layers": [1]}}, {"mtp_num_hidden_layers": 1}),
        ({"width": {"mlp": 0.7}}, {"num_nextn_predict_layers": 1}),
        ({"experts": {"keep": 2}}, {"num_mtp_modules": 1, "use_mtp": True}),
        ({"sparsity": {"pattern": 0.5}}, {"mtp_depth_of_draft": 1}),
    ],
    ids=["depth", "width", "experts", "sparsity"],
)
def test_no_config_declares_a_head_that_does_not_come_along(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Whatever is cut: fields that count it, by their names or by the head's tensors, say that there is none."""
    monkeypatch.setattr(
        LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."]
    )  # as of families with heads
    base = with_head(tmp_path / "base", "qwen3_next" if "experts" in cut else "llama", **fields, mtp_hidden_size=32)
    report = prune(made, base, tmp_path, **{"depth": None, "width": None} | cut)
    written = config_of(tmp_path / "run" / "model")
    assert {name: written[name] for name in fields} == {name: type(value)(0) for name, value in fields.items()}
    assert written["mtp_hidden_size"] == 32
    assert not [name for name in load_file(tmp_path / "run" / "model" / "model.safetensors") if "mtp" in name]
    said = [warning for warning in report.warnings if "predict further tokens" in warning]
    assert len(said) == 1
    assert all(name in said[0] for name in fields)


# ---- Python code of the base

CONFIG_CODE = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
CODE = {"configuration_own.py": CONFIG_CODE, "modeling_own.py": MODEL_CODE}
MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def test_trusted_code_comes_along(made: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are those of the base, the config names them, and the result loads with them.

    What else lies in a folder of code stays behind, and the report says so.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    add(base, CODE | {"parts/kernel.py": "x = 1\n", "parts/sizes.json": "{}"})
    edit(base / "config.json", model_type="own", auto_map=MAP, architectures=["OwnForCausalLM"], own_field=7)
    report = prune(made, base, tmp_path, model={"id": str(base), "trust_remote_code": True})
    result = tmp_path / "run" / "model"
    assert {name: (result / name).read_text() for name in CODE} == CODE
    assert (result / "parts" / "kernel.py").is_file()
    assert "another format" in report.base_files.left["parts/sizes.json"]
    before, after = config_of(base), config_of(result)
    assert after == before | {"num_hidden_layers": 2, "intermediate_size": 64}
    loaded = AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)
    assert (type(loaded).__name__, len(loaded.model.layers)) == ("OwnForCausalLM", 2)


def test_code_that_is_not_trusted_is_not_named(made: Path, base: Path, tmp_path: Path) -> None:
    """Without trust no file of the result names code, so that it loads with trust too."""
    add(base, CODE | {"preprocessor_config.json": json.dumps({"size": 7, "auto_map": {"AutoProcessor": "a.B"}})})
    edit(base / "config.json", auto_map=MAP)
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    prune(made, base, tmp_path)
    result = tmp_path / "run" / "model"
    assert not list(result.glob("*.py"))
    assert not [path.name for path in result.glob("*.json") if "auto_map" in path.read_text()]
    assert type(AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)).__name__ == "LlamaForCausalLM"
    AutoTokenizer.from_pretrained(result, trust_remote_code=True)


# ---- spellings


def edited(folder: Path, config: PretrainedConfig, keep: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    """What a cut makes of a config file that a config and these fields give; None takes one out."""
    config.save_pretrained(folder)
    raw = {name: value for name, value in (config_of(folder) | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    before = AutoConfig.from_pretrained(folder)
    return edited_config(ConfigChange(folder, before, edit_config(before, keep, widths={}), keep, False))


def test_a_text_with_a_letter_for_each_layer_loses_letters(tmp_path: Path) -> None:
    """And the number of layers follows, though the class takes it from the text."""
    fields = {"hybrid_override_pattern": "M*-E", "num_hidden_layers": 4, "layers_block_type": None}
    written = edited(tmp_path, tiny_config("nemotron_h"), (0, 1, 3), **fields)
    assert (written["hybrid_override_pattern"], written["num_hidden_layers"]) == ("M*E", 3)
    assert "layers_block_type" not in written


def test_lists_that_go_on_for_prediction_heads_end_with_the_layers(tmp_path: Path) -> None:
    """Where the head is gone, its entries are too, and the class accepts the file."""
    config = tiny_config("step3p7")
    text = config.text_config.to_dict()
    text |= {"num_nextn_predict_layers": 1, "layer_types": [*text["layer_types"], "full_attention"]}
    count = text["num_hidden_layers"]
    written = edited(tmp_path, config, tuple(range(count)), text_config=text)["text_config"]
    assert (written["num_nextn_predict_layers"], len(written["layer_types"])) == (0, count)


def test_a_packaged_model_is_written_for_older_versions_too(base: Path) -> None:
    """Its config says the same in both spellings, and its tokenizer is of a class that both have."""
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


def test_a_hub_model_brings_all_its_small_files(
    hub: Hub, made: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan lists them before they are there; none is fetched that stays behind for its kind or size.

    The report lists those too.
    """
    monkeypatch.setattr(companions, "LARGEST", 1000)
    add(base, CARRIED | {name: text for name, (text, _) in LEFT.items()} | SILENT)
    hub.add_repo("org/base", files_of(base))
    planned = make_plan(Recipe.load(write_recipe(tmp_path / "recipe.yaml", "org/base", made / "text.txt")))
    report = prune(made, "org/base", tmp_path)
    result = tmp_path / "run" / "model"
    assert {name: (result / name).read_bytes() for name in CARRIED} == {
        name: (base / name).read_bytes() for name in CARRIED
    }
    assert planned.base_files.left.keys() <= report.base_files.left.keys()
    assert {"big.csv", "onnx/config.json", "modeling_own.py"} <= report.base_files.left.keys()
    assert set(planned.base_files.carried) - set(report.base_files.carried) == {"params.json", "exponents.json"}
    got = {line.split("/resolve/")[1].split("/", 1)[1] for line in hub.lines if line.startswith("GET /org/base/res")}
    assert not got & {"big.csv", "onnx/config.json", "modeling_own.py", "extra.bin", "model.onnx"}
