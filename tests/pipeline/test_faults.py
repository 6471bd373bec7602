"""Bad input and bad luck: one clear error each, before the expensive work, and never a damaged model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.commands import TASKS, Outcome, command, save_model, states, verify_here, write_recipe, write_text
from safetensors.torch import load_file, save_file

from llmprune.testing import tiny_config, tiny_model

UP_PROJECTION = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_here(monkeypatch)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` (a model) and ``text.txt``."""
    folder = tmp_path_factory.mktemp("room")
    write_text(folder / "text.txt")
    save_model(folder / "base")
    return folder


@pytest.fixture
def finished(room: Path, tmp_path: Path) -> Path:
    """A run folder with all its products, made once and copied."""
    if not (room / "out").exists():
        assert run(room, room).code == 0
    shutil.copytree(room / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where either pass over the layers starts."""
    for name in ("pipeline.score_and_select.score", "pipeline.run.Pruning"):
        monkeypatch.setattr(f"llmprune.{name}", lambda *_, **__: pytest.fail("the expensive work began"))


@pytest.fixture
def no_weights(no_passes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are read."""
    monkeypatch.setattr("llmprune.pipeline.inputs.load_model", lambda source: pytest.fail("weights were read"))


def run(room: Path, tmp_path: Path, base: Path | str | None = None, **sections: Any) -> Outcome:
    """Prune ``base`` (or the room's) into ``out``."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base or room / "base", room / "text.txt", **sections)
    return command("run", recipe, "--output", tmp_path / "out")


def assert_refused(outcome: Outcome, code: int, *said: str) -> None:
    """The command ended with this code and one message that says all this."""
    assert outcome.code == code, outcome.err
    assert outcome.err.count("llmprune: ") == 1
    assert "Traceback" not in outcome.err
    for words in said:
        assert words in outcome.err


def broken(room: Path, tmp_path: Path, spoil: Callable[[Path], object]) -> Path:
    """A copy of the model, spoilt."""
    folder = tmp_path / "broken"
    shutil.copytree(room / "base", folder)
    spoil(folder)
    return folder


def with_config(**changes: Any) -> Callable[[Path], object]:
    """Spoil ``config.json``."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Spoil the weights."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def cut_short(folder: Path) -> None:
    """Half a weights file."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(folder: Path) -> None:
    """The weights as an old checkpoint has them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_shard(folder: Path) -> None:
    """Several shards, one of them gone."""
    (folder / "model.safetensors").unlink()
    tiny_model("llama", vocab_size=260, num_hidden_layers=4).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model-00002-of-00003.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    """The model alone."""
    for path in folder.glob("*token*"):
        path.unlink()


# ---- the model


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_config(model_type="frobnicator"), ["config", "`frobnicator`"]),
        (with_config(hidden_size="32"), ["config", "'hidden_size' expected int, got str"]),
        (with_config(num_attention_heads=5, head_dim=None), ["config", "not a multiple of the number of attention"]),
        (with_config(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantized (gptq)", "prune the orig"]),
        (with_config(auto_map={"AutoConfig": "a.B"}, model_type="own"), ["own Python code", "trust_remote_code"]),
        pytest.param(with_config(hidden_act="nonsense"), ["'nonsense'"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config", "not a valid JSON"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json", "folder of a Hugging Face checkpoint"]),
        (without_tokenizer, ["has no tokenizer", "beside config.json"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer", "fetch"]),
        (
            lambda folder: tiny_config("bert", is_decoder=False).save_pretrained(folder),
            ["'bert'", "not a causal decoder", "both direct"],
        ),
        (lambda folder: tiny_config("t5").save_pretrained(folder), ["'t5' is not a causal decoder"]),
        (as_pickle, ["never pickles", "convert the checkpoint to safetensors"]),
    ],
    ids=[
        "unknown", "wrong-type", "impossible", "quantized", "own-code", "activation", "no-json", "no-config",
        "no-tokenizer", "broken-tokenizer", "bert", "t5", "pickle",
    ],
)  # fmt: skip
def test_model_that_cannot_be_pruned(
    room: Path, tmp_path: Path, spoil: Callable[[Path], object], said: list[str]
) -> None:
    """What config and tokenizer show is refused before weights are read."""
    outcome = run(room, tmp_path, broken(room, tmp_path, spoil))
    assert_refused(outcome, 2, str(said[0]), *said[1:])
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.usefixtures("no_passes")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_short, ["weights file", "damaged or cut short", "fetch it again"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), ["weights file", "fetch it again"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["lacks a safetensors weights file"]),
        (without_a_shard, ["model-00002-of-00003.safetensors", "fetch the missing file"]),
        (with_tensors(lambda tensors: tensors.pop(UP_PROJECTION)), ["1 missing", UP_PROJECTION, "whole checkpoint"]),
        (with_tensors(lambda tensors: tensors.update(more=torch.zeros(2))), ["1 unexpected: more"]),
        (
            with_tensors(lambda tensors: tensors.update({UP_PROJECTION: torch.zeros(5, 32)})),
            ["1 mismatched", f"{UP_PROJECTION} ([5, 32], not [96, 32])"],
        ),
    ],
    ids=["cut-short", "garbage", "none", "no-shard", "missing", "unexpected", "shape"],
)
def test_damaged_checkpoint(room: Path, tmp_path: Path, spoil: Callable[[Path], object], said: list[str]) -> None:
    """Missing, damaged or strange weights end the run before the passes; nothing is guessed."""
    folder = broken(room, tmp_path, spoil)
    outcome = run(room, tmp_path, folder)
    assert_refused(outcome, 1, str(folder), *said)
    assert not (tmp_path / "out" / "model").exists()


def test_a_plan_needs_no_weights_but_refuses_damaged_ones(room: Path, tmp_path: Path) -> None:
    """``plan`` reads the headers of weights files: one that is cut short is told, and without any it says so."""
    folder = broken(room, tmp_path, cut_short)
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, room / "text.txt")
    assert_refused(command("plan", recipe), 1, "damaged or cut short")
    (folder / "model.safetensors").unlink()
    outcome = command("plan", recipe)
    assert outcome.code == 0
    assert "no safetensors weights file, which a run needs" in " ".join(outcome.out.split())


@pytest.mark.parametrize("model", ["org/none", "none"])
def test_hub_out_of_reach(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, no_weights: None
) -> None:
    """Offline, a model that is neither a folder nor in the cache is refused at once, with what to check."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert_refused(run(room, tmp_path, model), 2, f"no folder '{model}'", "HF_HUB_OFFLINE is set")
    assert time.perf_counter() - start < 10  # not half a minute of retries, on a busy machine too
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_in_activations(room: Path, tmp_path: Path, value: float) -> None:
    """A weight that makes a layer put out NaN or infinity ends pass 1 and names the layer."""
    spoil = with_tensors(lambda tensors: tensors[UP_PROJECTION].view(-1)[0].fill_(value))
    outcome = run(room, tmp_path, broken(room, tmp_path, spoil))
    assert_refused(outcome, 1, "layer 3", "NaN or infinity", "model.dtype")
    assert not (tmp_path / "out" / "model").exists()


def test_not_a_number_behind_the_layers(room: Path, tmp_path: Path) -> None:
    """NaN in the head, which no layer shows, is found by the verification."""
    spoil = with_tensors(lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    outcome = run(room, tmp_path, broken(room, tmp_path, spoil))
    assert_refused(outcome, 1, "logits")
    assert not (tmp_path / "out" / "model").exists()


# ---- the recipe against the model


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"depth": {"remove": 4}}, ["depth.remove", "4 layers", "at most 3"]),
        pytest.param({"depth": {"remove": 99}}, ["depth.remove", "4 layers", "99", "at most 3"]),
        ({"depth": {"keep": 0}}, ["depth.keep: must be above 0, not 0"]),
        ({"depth": {"keep": 5}}, ["depth.keep", "4 layers", "at most 4"]),
        ({"depth": {"layers": [2, 4]}}, ["depth.layers", "layers 0 to 3", "[4]"]),
        ({"width": {"neurons": 97}}, ["width.neurons: 97 is more than the 96 neurons"]),
        ({"width": {"neurons": 0}}, ["width.neurons: must be above 0, not 0"]),
        ({"width": {"mlp": 1.5}}, ["width.mlp: must be at most 1.0, not 1.5"]),
        ({"evaluation": {"gate": {"min_retention": 0.9}}}, ["evaluation.gate", "name lm-eval tasks"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_targets(room: Path, tmp_path: Path, sections: dict[str, Any], said: list[str]) -> None:
    """A target that the model cannot meet names key, value and limit, in ``plan`` as in ``run``."""
    outcome = run(room, tmp_path, **sections)
    assert_refused(outcome, 2, *said)
    assert not (tmp_path / "out").exists()
    assert command("plan", tmp_path / "recipe.yaml").err == outcome.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({"dataset": "empty.txt"}, ["empty.txt is empty", "give one with text"]),
        ({"dataset": "blank.jsonl", "sequence_length": 32}, ["blank.jsonl", "no text at all"]),
        ({"dataset": "nowhere.txt"}, ["nowhere.txt does not exist"]),
        ({"dataset": "few.txt", "samples": 90, "sequence_length": 64}, ["few.txt", "5,760", "ask for at most"]),
        ({"dataset": "few.txt", "samples": 1, "sequence_length": 256}, ["256 tokens", "128 positions", "at most 128"]),
        ({"tokens": "beyond.safetensors", "key": "ids"}, ["299", "0 to 259", "this model's tokenizer"]),
    ],
    ids=["empty", "blank", "missing", "few", "long", "beyond"],
)
def test_calibration_that_does_not_serve(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: dict[str, Any], said: list[str]
) -> None:
    """Text that is missing, too short, or not the model's own tokens is refused before weights are read."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("blank.jsonl").write_text('{"text": ""}\n' * 3)
    write_text(Path("few.txt"), paragraphs=20)
    save_file({"ids": torch.arange(200, 300).view(2, 50)}, "beyond.safetensors")
    assert_refused(run(room, tmp_path, calibration=calibration), 2, *said)
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.usefixtures("no_passes")
@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"perplexity": {"dataset": "nowhere.txt"}}, ["nowhere.txt does not exist"]),
        ({"perplexity": {"dataset": "few.txt", "samples": 90, "sequence_length": 64}}, ["few.txt", "5,760"]),
        ({"perplexity": {"dataset": "few.txt", "samples": 1, "sequence_length": 256}}, ["128 positions"]),
        ({"perplexity": {"tokens": "beyond.safetensors", "key": "ids"}}, ["299", "0 to 259"]),
        ({"speed": {"prompt_tokens": 100, "new_tokens": 100}}, ["evaluation.speed", "128 positions"]),
    ],
    ids=["missing", "few", "long", "beyond", "speed"],
)
def test_evaluation_that_cannot_be(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: dict[str, Any], said: list[str]
) -> None:
    """What the evaluation lacks is known before the model is pruned."""
    monkeypatch.chdir(tmp_path)
    write_text(Path("few.txt"), paragraphs=20)
    save_file({"ids": torch.arange(200, 300).view(2, 50)}, "beyond.safetensors")
    assert_refused(run(room, tmp_path, evaluation=evaluation), 2, *said)


@pytest.mark.usefixtures("no_weights")
def test_unknown_task(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that lm-eval does not know is refused before anything is made, with the nearest name."""
    from llmprune.evaluation.lm_eval import tasks

    own = tasks._manager(TASKS)  # lm-eval's full index takes 13 s
    monkeypatch.setattr(tasks, "_all_tasks", lambda folder: own)
    asked = {"tasks": ["llmprune_agrement"], "include_path": str(TASKS)}
    assert_refused(run(room, tmp_path, evaluation=asked), 2, "evaluation.tasks", "'llmprune_agreement'?")
    assert not (tmp_path / "out").exists()


def test_model_without_tokenizer_and_ready_tokens(room: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ready tokens need no tokenizer: the result has none either, and that is said."""
    save_file({"ids": torch.arange(256).view(8, 32)}, tmp_path / "ids.safetensors")
    ready = {"tokens": str(tmp_path / "ids.safetensors"), "key": "ids"}
    outcome = run(room, tmp_path, broken(room, tmp_path, without_tokenizer), calibration=ready)
    assert outcome.code == 0, outcome.err
    assert not list((tmp_path / "out" / "model").glob("*token*"))
    assert "no tokenizer is loaded" in caplog.text
    with_text = {"perplexity": {"dataset": str(room / "text.txt"), "samples": 2, "sequence_length": 32}}
    outcome = run(room, tmp_path, tmp_path / "broken", calibration=ready, evaluation=with_text)
    assert_refused(outcome, 2, "has no tokenizer")
    generation = {"generation": {"samples": 2, "prompt_tokens": 8, "new_tokens": 8}}
    with_generation = {"perplexity": ready | {"samples": 4, "sequence_length": 32}, **generation}
    outcome = run(room, tmp_path, tmp_path / "broken", calibration=ready, evaluation=with_generation)
    assert_refused(outcome, 2, "has no tokenizer")


# ---- the output folder


@pytest.mark.usefixtures("no_weights")
def test_output_that_cannot_be_used(room: Path, tmp_path: Path) -> None:
    """A file, a folder of other things, and a path through a file are refused and left as they are."""
    (tmp_path / "out").write_text("mine")
    assert_refused(run(room, tmp_path), 2, "out is a file", "give a folder")
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for options in ([], ["--fresh"]):
        outcome = command("run", tmp_path / "recipe.yaml", "--output", tmp_path / "out", *options)
        assert_refused(outcome, 2, "not empty and is no llmprune run", "new or an empty folder")
    assert states(tmp_path / "out") == {"thesis.tex": b"mine"}
    through = tmp_path / "out" / "thesis.tex" / "deeper"
    assert_refused(command("run", tmp_path / "recipe.yaml", "--output", through), 2, "cannot be used", "another --out")
    long = tmp_path / ("x" * 300)
    assert_refused(command("run", tmp_path / "recipe.yaml", "--output", long), 2, "cannot be used", "File name too")


def test_output_that_holds_the_model(room: Path, tmp_path: Path, finished: Path) -> None:
    """A run that would replace the model it reads is refused, and so is starting it afresh."""
    model = states(finished / "model")
    assert_refused(
        run(room, tmp_path, finished / "model", depth={"remove": 1}, width=None),
        2,
        "would replace it",
        "another --output",
    )
    again = command("run", tmp_path / "recipe.yaml", "--output", finished, "--fresh")
    assert_refused(again, 2, "would replace it")
    assert states(finished / "model") == model


def test_output_in_use(room: Path, tmp_path: Path) -> None:
    """A folder that another run holds is refused, and free again when that run ends."""
    from llmprune.results.run_folder import RunFolder

    other = RunFolder.open(tmp_path / "out")
    assert_refused(run(room, tmp_path), 2, "another run is using", "wait for it")
    other.close()
    assert run(room, tmp_path).code == 0


@pytest.mark.usefixtures("no_weights")
def test_no_space_is_known_beforehand(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small for the result is refused before anything is made."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))
    assert_refused(run(room, tmp_path), 1, "the result needs", "1 KB free", "make room, or choose another --output")
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails in the middle of pass 2 is one error; when there is room again, the run continues."""
    from safetensors import torch as saver

    original, written = saver.save_file, []

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        if "layer-00001" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(str(path))
        original(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_file", save)
        outcome = run(room, tmp_path)
    assert any("layer-00000" in path for path in written), "the write failed in the middle"
    assert_refused(outcome, 1, "No space left on device", "make room", "run again")
    assert not (tmp_path / "out" / "model").exists()
    assert not list((tmp_path / "out").rglob("config.json"))
    assert run(room, tmp_path).code == 0
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert {step["name"] for step in steps if step["reused"]} == {"pass 1"}
    assert not (tmp_path / "out" / "model.partial").exists()


# ---- verification and interruption


def test_verification_refuses_a_corrupt_result(
    room: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that changed between computing and reloading is found, and the old model stays."""
    from llmprune.checkpoint.saving import CheckpointWriter

    model = states(finished / "model")
    original = CheckpointWriter.finish

    def finish(writer: CheckpointWriter, *arguments: Any) -> None:
        original(writer, *arguments)
        with_tensors(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))(writer.folder)

    monkeypatch.setattr(CheckpointWriter, "finish", finish)
    recipe = write_recipe(tmp_path / "recipe.yaml", room / "base", room / "text.txt", depth={"remove": 1})
    outcome = command("run", recipe, "--output", finished, "--fresh")
    assert_refused(outcome, 1, "loaded in a fresh process and refused", "logits differ", "not published")
    assert states(finished / "model") == model


def test_damaged_products_are_made_again(
    room: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A product that cannot be read is made again, with a warning that names it."""
    model = states(finished / "model")
    (finished / "scores.safetensors").write_bytes(b"nonsense")
    (finished / "pruning.json").write_text("{}")
    assert run(room, tmp_path).code == 0
    assert "scores.safetensors is damaged" in caplog.text
    assert "pruning.json is damaged" in caplog.text
    assert states(finished / "model") == model


def test_journal_that_cannot_be_read(room: Path, tmp_path: Path, finished: Path) -> None:
    """A damaged journal is refused with the remedy, and the remedy works."""
    (finished / "run.json").write_text("{")
    assert_refused(run(room, tmp_path), 2, "run.json cannot be read", "--fresh")
    assert command("run", tmp_path / "recipe.yaml", "--output", finished, "--fresh").code == 0


# The command with a pass 2 that waits after its first layer. Ctrl-C reaches it even where the tests run in the
# background, whose processes ignore it.
_SLOW = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmprune.checkpoint.saving import CheckpointWriter
write = CheckpointWriter.write_layer
def write_and_wait(self, index, tensors):
    write(self, index, tensors)
    time.sleep(60)
CheckpointWriter.write_layer = write_and_wait
from llmprune.cli.main import main
main()
"""


def test_interrupted_run_continues(room: Path, tmp_path: Path) -> None:
    """Ctrl-C in pass 2 ends with a sentence and no model; the same command continues."""
    recipe = write_recipe(tmp_path / "recipe.yaml", room / "base", room / "text.txt")
    arguments = ["run", str(recipe), "--output", str(tmp_path / "out")]
    command_line = [sys.executable, "-c", _SLOW, *arguments]
    first = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("layer-00000.safetensors")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    busy = command(*arguments)
    assert_refused(busy, 2, "another run is using")
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert said.endswith("\nllmprune: stopped; run the same command again to continue\n")
    assert not (tmp_path / "out" / "model").exists()
    assert command(*arguments).code == 0
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert {step["name"] for step in steps if step["reused"]} == {"pass 1"}
    assert (tmp_path / "out" / "model" / "config.json").is_file()
