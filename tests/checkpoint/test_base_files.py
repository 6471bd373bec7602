"""Files of the base model: those that the result gets, and those that are left out with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.base_models import add, config_of, edit, prune
from helpers.commands import write_recipe
from helpers.hub.published import files_of
from helpers.hub.server import Hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune import ModelError, Recipe
from llmprune.checkpoint.copied_files import LARGEST, is_copied, select_files
from llmprune.planning.plan import make_plan

pytestmark = pytest.mark.usefixtures("quick_verification")
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "extra_special_tokens": {}}


# Files of a base that are copied, by path, with their content.
COPIED: dict[str, str] = {
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


# Files that are left out, by path, with their content and the reason.
LEFT_OUT: dict[str, tuple[str, str]] = {
    "pytorch_model.bin.index.json": ("{}", "describes the base's weights"),
    "params.json": ('{"dim": 32, "n_layers": 4}', "describes the base's weights"),
    "exponents.json": ('{"model.layers.0.mlp.up_proj.weight": 3}', "describes the base's weights"),
    "model.safetensors.sha256": ("abc", "describes the base's weights"),
    "modeling_own.py": ("raise SystemExit", "code, which the recipe does not trust"),
    "onnx/config.json": ("{}", "is in a subfolder of another format"),
}


# Files that are left out without a reason.
UNLISTED = {"README.md": "# A base", "llmprune.json": "{}", ".gitattributes": "x", "model.onnx": "x", "extra.bin": "x"}


def make_large(path: Path) -> None:
    """Make a sparse file that is larger than copied files may be."""
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)


def test_files_other_than_weights_are_copied_byte_for_byte(made: Path, base: Path, tmp_path: Path) -> None:
    """Tokenizer, settings, templates and licences are copied; large files and those that describe weights are not.

    Plan and report list both kinds.
    """
    others = {name: text for name, (text, _) in LEFT_OUT.items()} | UNLISTED
    add(base, COPIED | others)
    make_large(base / "big.csv")
    report = prune(made, base, tmp_path)
    plan = make_plan(Recipe.load(tmp_path / "recipe.yaml"))
    result = tmp_path / "run" / "model"
    same = {*COPIED, "tokenizer.json", "chat_template.jinja"}
    assert set(files_of(result)) == same | {"config.json", "model.safetensors"}
    assert {name: (result / name).read_bytes() for name in same} == {name: (base / name).read_bytes() for name in same}
    assert plan.base_files == report.base_files
    assert set(report.base_files.carried) == same
    listed = {name.replace("onnx", "onnx/config.json"): why for name, why in report.base_files.left.items()}
    assert "larger than" in listed.pop("big.csv")
    assert listed.keys() == LEFT_OUT.keys()
    assert all(why in listed[name] for name, (_, why) in LEFT_OUT.items())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "tokenizer.model" in page
    assert "modeling_own.py (code, which the recipe does not trust)" in page


def test_a_large_tokenizer_is_copied() -> None:
    """The limit on the size of a file does not apply to tokenizers."""
    assert is_copied("tokenizer.model", LARGEST + 1, trusted=False)
    assert not is_copied("notes.csv", LARGEST + 1, trusted=False)


def test_irregular_entries_do_not_stop_a_run(made: Path, base: Path, tmp_path: Path) -> None:
    """A pipe, a broken link and folders in place of files are left out, with a reason."""
    (base / "LICENSES").mkdir()
    os.mkfifo(base / "NOTICE")
    os.mkfifo(base / "LICENSES" / "pipe")
    (base / "LICENSE").symlink_to("nowhere")
    (base / "USE_POLICY").mkdir()
    (base / "tokenizer.model").mkdir()
    found = select_files(base, trusted=False)
    assert {"NOTICE", "LICENSES/pipe", "LICENSE", "USE_POLICY", "tokenizer.model"} == found.left_out.keys()
    prune(made, base, tmp_path, width=None)
    assert not [path for path in (tmp_path / "run" / "model").iterdir() if path.name.startswith(("LIC", "NOT", "USE"))]


def test_a_link_out_of_the_folder_is_never_copied(base: Path, tmp_path: Path) -> None:
    """A link to a file outside the model's folder, such as a picture, is left out."""
    (tmp_path / "secret").write_text("secret")
    (base / "figure.png").symlink_to(tmp_path / "secret")
    (base / "inside.png").symlink_to("config.json")
    found = select_files(base, trusted=False)
    assert found.left_out == {"figure.png": "a link that leads out of the model's folder"}
    assert "inside.png" in found.copied


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_reported_by_the_plan(made: Path, base: Path, tmp_path: Path) -> None:
    """The error comes before weights are read, with the remedy."""
    (base / "LICENSE").write_text("x")
    (base / "LICENSE").chmod(0)
    with pytest.raises(ModelError, match=r"LICENSE of the base model is copied .* make it readable"):
        prune(made, base, tmp_path)


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


def test_trusted_code_is_copied(made: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python files are copied, the config names them, and the result loads with them.

    Other files in a folder of code are left out, which the report lists.
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
    """Without trust no file of the result names code, so it loads even with trust_remote_code."""
    add(base, CODE | {"preprocessor_config.json": json.dumps({"size": 7, "auto_map": {"AutoProcessor": "a.B"}})})
    edit(base / "config.json", auto_map=MAP)
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    prune(made, base, tmp_path)
    result = tmp_path / "run" / "model"
    assert not list(result.glob("*.py"))
    assert not [path.name for path in result.glob("*.json") if "auto_map" in path.read_text()]
    assert type(AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)).__name__ == "LlamaForCausalLM"
    AutoTokenizer.from_pretrained(result, trust_remote_code=True)


def test_small_files_of_a_hub_model_are_copied(hub: Hub, made: Path, base: Path, tmp_path: Path) -> None:
    """The plan lists them before they are downloaded. Files left out for their kind or size are never downloaded."""
    add(base, COPIED | {name: text for name, (text, _) in LEFT_OUT.items()} | UNLISTED)
    make_large(base / "big.csv")
    hub.add_repo("org/base", files_of(base))
    planned = make_plan(Recipe.load(write_recipe(tmp_path / "recipe.yaml", "org/base", made / "text.txt")))
    report = prune(made, "org/base", tmp_path)
    result = tmp_path / "run" / "model"
    assert {name: (result / name).read_bytes() for name in COPIED} == {
        name: (base / name).read_bytes() for name in COPIED
    }
    assert planned.base_files.left.keys() <= report.base_files.left.keys()
    assert {"big.csv", "onnx/config.json", "modeling_own.py"} <= report.base_files.left.keys()
    assert set(planned.base_files.carried) - set(report.base_files.carried) == {"params.json", "exponents.json"}
    got = {line.split("/resolve/")[1].split("/", 1)[1] for line in hub.lines if line.startswith("GET /org/base/res")}
    assert not got & {"big.csv", "onnx/config.json", "modeling_own.py", "extra.bin", "model.onnx"}
