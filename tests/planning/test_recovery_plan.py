"""The training after the cut in a plan: steps, memory by method, disk, time, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import save_model, write_text
from helpers.devices import simulated_devices
from helpers.public_configs import LLAMA_31_8B, SMOLLM2_135M
from helpers.tiny import structure_of
from safetensors.torch import save_file

from llmprune.common.console import PlainConsole
from llmprune.common.errors import LLMPruneError
from llmprune.planning.duration.operations import Work
from llmprune.planning.duration.recovering import PREDICTIONS, TRAINING
from llmprune.planning.memory import machine
from llmprune.planning.plan import make_plan
from llmprune.planning.plan_schema import Plan
from llmprune.planning.recovery.plan import RecoveryPlan
from llmprune.recipe.recipe import Recipe
from llmprune.report.plan_table import print_plan

GB = 10**9
Change = Callable[[dict[str, Any], Path], object]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with ``base`` (a model of 64 positions), a text of about 5,000 tokens, and ready tokens."""
    folder = tmp_path_factory.mktemp("recovery")
    save_model(folder / "base", max_position_embeddings=64)
    write_text(folder / "text.txt")
    (folder / "empty.txt").touch()
    save_file({"ids": torch.ones(4, 32, dtype=torch.int64)}, folder / "ids.safetensors")
    return folder


def _plan(shared: Path, change: Change = lambda *_: None) -> Plan:
    text = {"dataset": str(shared / "text.txt"), "samples": 4, "sequence_length": 32, "self_generated": 0}
    data: dict[str, Any] = {"model": {"id": str(shared / "base")}, "calibration": text, "depth": {"remove": 1}}
    data |= {"evaluation": {"generation": False}}
    data["recover"] = {"tokens": 1000, "batch_tokens": 128, "data": {"self_generated": False}}
    change(data, shared)
    return make_plan(Recipe.parse(yaml.safe_dump(data)))


def _of(plan: Plan) -> RecoveryPlan:
    assert plan.recovery is not None
    return plan.recovery


def _work(plan: Plan, name: str) -> Work:
    work = next(part.work for part in plan.work.parts if part.name == name)
    assert work is not None
    return work


def test_the_steps_are_whole_and_the_plan_shows_them(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 tokens are 8 steps of 4 windows of 32 tokens; the table says so, with memory and disk."""
    plan = _plan(shared)
    found = _of(plan)
    assert (found.steps, found.tokens, found.windows_of_step) == (8, 8 * 128, 4)
    assert (found.memory.weights, found.memory.optimiser) == (4 * plan.pruned.parameters, 12 * found.trained)
    print_plan(plan, PlainConsole())
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recovery: trained on 1,024 tokens, in 8 steps of 4 × 32 tokens (full, distillation" in shown


def test_activations_are_those_of_the_windows_at_a_time(shared: Path) -> None:
    """By default a whole step of 4 small windows; a batch size of the recipe wins, but no step has more windows."""

    def activations(size: int | str) -> int:
        plan = _plan(shared, lambda data, _: data["recover"]["data"].update(batch_size=size))
        return _of(plan).memory.activations

    assert activations("auto") == activations(4) == activations(9) == 4 * activations(1)


def test_activations_are_computed_again_where_they_would_not_fit(tmp_path: Path) -> None:
    """Keeping them is refused where it is asked for, with what would fit; by default they are then computed again."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M))
    text = (
        f"model: {{id: '{tmp_path}'}}\ncalibration: {{dataset: text.txt, self_generated: 0}}\ndepth: {{remove: 4}}\n"
        "recover: {tokens: 1M}\n"
    )

    def planned(memory: float, *changes: str) -> Plan:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "machine_memory", lambda: int(memory))
            return structure_of(Recipe.parse(text, list(changes)))

    large, small, refused = planned(24 * GB), planned(4 * GB), planned(4 * GB, "recover.checkpointing=false")
    assert [_of(plan).checkpointing for plan in (large, small, refused)] == [False, True, False]
    assert large.shortage is None
    assert small.shortage is None
    assert refused.shortage is not None
    assert "set recover.checkpointing: true (" in refused.shortage


def test_embeddings_and_head_are_counted_if_they_are_trained(shared: Path) -> None:
    """They have gradients and moments only where the recipe asks for their training."""
    without, with_them = _plan(shared), _plan(shared, lambda data, _: data["recover"].update(embeddings=True))
    assert _of(with_them).trained == with_them.pruned.parameters
    assert _of(with_them).trained - _of(without).trained == 2 * 260 * 32
    assert _of(with_them).memory.weights == _of(without).memory.weights


def test_adapters_are_all_that_lora_trains(shared: Path) -> None:
    """Only the adapters have gradients and moments; their number follows from the matrices and the rank."""
    plan = _plan(shared, lambda data, _: data["recover"].update(method="lora", lora={"rank": 2}))
    sides = 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 96))  # of 3 layers: 4 projections of attention, 3 of the MLP
    assert _of(plan).trained == 2 * sides
    assert _of(plan).memory.optimiser == 12 * 2 * sides


def test_time_follows_from_passes(shared: Path) -> None:
    """A step costs three forward passes of the layers and, without gradients of its weights, two of the head.

    The dense model predicts each window once.
    """

    def planned(tokens: int = 2048, **settings: Any) -> Plan:
        return _plan(shared, lambda data, _: data["recover"].update(settings, tokens=tokens, check_every=99))

    few, more, lora = planned(1024), planned(), planned(method="lora", lora={"rank": 1})
    all_trained, matched = planned(embeddings=True), planned(hidden_states=1.0)
    attention, mlp, head = 2 * (2 * 32 * 32 + 2 * 32 * 16) + 4 * 32 * 32, 2 * 3 * 32 * 96, 2 * 32 * 257
    layers = 3 * (attention + mlp)
    one = (_work(more, TRAINING).sums - _work(few, TRAINING).sums) / 1024
    assert one == pytest.approx(3 * layers + 2 * head, rel=0.02)
    saved = [(_work(more, TRAINING).sums - _work(plan, TRAINING).sums) / 2048 for plan in (all_trained, lora)]
    assert saved == pytest.approx([-head, layers - 6 * _of(lora).trained], rel=0.02)
    assert _work(matched, TRAINING).plain_products == pytest.approx(2048 * 4 * (attention + mlp), rel=0.02)
    assert _work(few, PREDICTIONS).products > 1024 * 4 * (attention + mlp)
    hours = _plan(shared, lambda data, _: (data["recover"].pop("tokens"), data["recover"].update(hours=0.5)))
    assert _work(hours, TRAINING).seconds == 1800
    assert _of(hours).tokens is None


def test_the_size_of_the_dense_model_counts(shared: Path, tmp_path: Path) -> None:
    """Its pass is worth more passes of a model with fewer layers, and most where another, larger model predicts."""
    save_model(tmp_path / "large", num_hidden_layers=12)
    half = _plan(shared, lambda data, _: data.update(depth={"remove": 2}))
    one = _plan(shared)
    larger = _plan(shared, lambda data, _: data["recover"].update(against=str(tmp_path / "large")))
    attention, mlp, head = 2 * (2 * 32 * 32 + 2 * 32 * 16) + 4 * 32 * 32, 2 * 3 * 32 * 96, 2 * 32 * 257
    passes = [(4 * (attention + mlp) + head) / (kept * (attention + mlp) + head) for kept in (2, 3)]
    assert [_of(plan).dense_pass for plan in (half, one)] == pytest.approx(passes, rel=0.01)
    assert _of(larger).dense_pass == pytest.approx(passes[1] * larger.dense.parameters / one.dense.parameters, rel=0.01)
    assert _work(larger, PREDICTIONS).products > 2 * _work(one, PREDICTIONS).products


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, _: data["recover"].update(tokens=100),
         r"recover\.tokens: 100 tokens are fewer than one step, which has 128 \(4 × 32\); ask for at least 128"),
        (lambda data, shared: data["recover"].update(against=str(shared / "text.txt")),
         r"^recover\.against: .*text.txt is a file; give a hub id"),
        (lambda data, shared: data["recover"]["data"].update(dataset=str(shared / "gone.txt")),
         r"recover\.data: the data file .*gone.txt does not exist"),
        (lambda data, shared: data["recover"]["data"].update(dataset=str(shared / "empty.txt")),
         r"recover\.data: the data file .*empty.txt is empty"),
        (lambda data, _: data["recover"]["data"].update(sequence_length=65),
         r"recover\.data\.sequence_length: windows of 65 tokens are longer than the model's 64 positions"),
        (lambda data, shared: data.update(calibration={
            "tokens": str(shared / "ids.safetensors"), "key": "ids", "self_generated": 0}),
         r"recover\.data: no data is left that calibration and perplexity did not see: they hold 128 tokens"),
        (lambda data, _: data["recover"]["data"].update(samples=4), "samples belongs to calibration"),
    ],
)  # fmt: skip
def test_what_a_plan_refuses(shared: Path, change: Change, message: str) -> None:
    """Each refusal names the key, the number and the remedy."""
    with pytest.raises(LLMPruneError, match=message):
        _plan(shared, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, _: data.pop("depth"), "nothing is cut, so that the training is plain fine-tuning"),
        (lambda data, _: data["recover"].update(lora={"rank": 4}), "recover.lora: not used with method: full"),
        (lambda data, _: data["recover"].update(loss="language_model", top_k=8),
         "recover.top_k: not used with loss: language_model"),
        (lambda data, _: data["recover"].update(check_every=50), "50 steps are more than the 8 of the training"),
        (lambda data, _: data["recover"].update(tokens=50_000), "more than 4 times adds little"),
    ],
)  # fmt: skip
def test_what_a_plan_notes(shared: Path, change: Change, message: str) -> None:
    """A training that cuts nothing, settings without effect and text that is repeated are noted."""
    assert message in " ".join(_plan(shared, change).notes)


def test_the_model_writes_half_of_the_windows(shared: Path) -> None:
    """``auto`` decides on half of the training's windows, those that are held out in addition."""
    plan = _plan(shared, lambda data, _: data["recover"].pop("data"))
    assert _of(plan).generated == 16 + 6  # 6 of 22 are held out, a quarter
    assert sum(source.windows for source in _of(plan).sources) == 16


def test_a_gpu_that_is_too_small_is_refused_with_what_fits(tmp_path: Path) -> None:
    """Full training of 8 B parameters takes more than 80 GB; the plan says that adapters fit."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    text = (
        f"model: {{id: '{tmp_path}'}}\ncalibration: {{dataset: text.txt, self_generated: 0}}\ndepth: {{remove: 4}}\n"
        "recover: {tokens: 1M}\n"
    )
    with simulated_devices(1, memory=80 * GB):
        full = structure_of(Recipe.parse(text))
        lora = structure_of(Recipe.parse(text, ["recover.method=lora"]))
    assert full.shortage is not None
    assert full.shortage.startswith("recover: cuda:0 has 80 GB, and method: full needs 1")
    assert "set recover.method: lora (" in full.shortage
    assert _of(full).memory.total > 16 * full.pruned.parameters
    assert lora.shortage is None
