"""Estimated durations: operations counted by hand on small models, rates that are given, and rates that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recipes import BASE
from helpers.tiny import structure_of

from llmprune.common.console import PlainConsole
from llmprune.planning import timing
from llmprune.planning.duration import measured, rates
from llmprune.planning.duration.estimate import Durations, durations, parts_with
from llmprune.planning.duration.operations import Work
from llmprune.planning.duration.parts import Part
from llmprune.planning.duration.rates import Rates
from llmprune.planning.duration.slowdown import slowdown
from llmprune.planning.plan_schema import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import EPOCHS
from llmprune.report.plan_table import print_plan
from llmprune.testing import tiny_config

# The tiny Llama: hidden size 32, 4 heads of 8, 2 key-value heads, MLPs of 96 neurons, 4 layers, vocabulary 128.
TOKENS = 6 * 32
ATTENTION = 2 * (32 * 32 * 2 + 32 * 16 * 2) + 4 * 32 * 32  # four projections; scores and sums over 32 tokens
MLP = 2 * 3 * 32 * 96
GIVEN = Rates(products=2e9, plain_products=1e9, sums=5e8, stream=1e10, narrow=5e9, copies=1e9, files=1e8, call=1e-6)
NOTHING = "refit: false\ndepth: {layers: [3]}\nevaluation: {generation: false}\n"


def _plan(
    folder: Path, sections: str, family: str = "llama", *, calibration: dict[str, Any] | None = None, **config: Any
) -> Plan:
    tiny_config(family, **config).save_pretrained(folder)
    shape = {"dataset": "text.txt", "samples": 6, "sequence_length": 32, "batch_size": 2, "self_generated": 0}
    calibration = shape | (calibration or {})
    text = f"model: {{id: '{folder}', dtype: float32}}\ncalibration: {json.dumps(calibration)}\n{sections}\n"
    return structure_of(Recipe.parse(text))


def _work(plan: Plan, name: str) -> Work:
    work = next(part.work for part in plan.work.parts if part.name == name)
    assert work is not None
    return work


def _timed(plan: Plan, processes: int = 1, **options: bool) -> Durations:
    flags = {"measures_forward": False, "checks_calibration": False} | options
    return durations(parts_with(plan.work, **flags), GIVEN, device="one", processes=processes, loading=7.0)


def test_a_forward_pass_counts_matrices_and_attention(tmp_path: Path) -> None:
    """Two operations for each entry of a matrix and token, and attention over the tokens of a window."""
    plan = _plan(tmp_path, "depth: {remove: 1}")
    assert plan.work.forward.products == TOKENS * 4 * (ATTENTION + MLP)
    assert _work(plan, "pass 1: scoring layers").products == plan.work.forward.products
    assert plan.work.forward.weights == 4 * 4 * (3072 + 9216 + 64)  # norms too, in float32


def test_criteria_add_their_own_products(tmp_path: Path) -> None:
    """``share`` multiplies once more by the output projection; gradients take a backward pass and the head."""
    share = _plan(tmp_path, "width: {neurons: 64}")
    assert _work(share, "pass 1: scoring layers").products == TOKENS * 4 * (ATTENTION + MLP + 2 * 96 * 32)
    taylor = _plan(tmp_path, "width: {neurons: 64, criterion: {kind: taylor}}")
    assert _work(taylor, "pass 1: scoring layers").products == taylor.work.forward.products
    head = TOKENS * 2 * 2 * 32 * 128
    assert _work(taylor, "pass 1: gradients").products == 2 * taylor.work.forward.products + head
    obs = _plan(tmp_path, "width: {neurons: 64, criterion: {kind: obs}}")
    assert _work(obs, "pass 1: scoring layers").solves == 4 * 2 * 4 * 96**3


def test_the_default_criterion_has_a_backward_pass_over_generated_windows(tmp_path: Path) -> None:
    """Its windows pass forward once more, and back; none do where only heads are cut, or nothing is generated."""
    two = {"self_generated": 2}
    plan = _plan(tmp_path, "width: {neurons: 64}", calibration=two)
    forward = 2 * 32 * 4 * (ATTENTION + MLP)
    assert _work(plan, "pass 1: hidden states for gradients").products == forward
    assert _work(plan, "pass 1: gradients").products > 2 * forward
    for sections, calibration in (("width: {heads: 1}", two), ("width: {neurons: 64}", {})):
        names = [part.name for part in _plan(tmp_path, sections, calibration=calibration).work.parts]
        assert "pass 1: scoring layers" in names
        assert not any("gradients" in name for name in names)


def test_of_a_mixture_only_active_experts_are_counted(tmp_path: Path) -> None:
    """Each token passes through two of four experts, and through the router."""
    plan = _plan(tmp_path, "depth: {remove: 1}", "qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[])
    experts, router = 2 * 2 * 3 * 32 * 48, 2 * 4 * 32
    assert plan.work.forward.products == TOKENS * 4 * (ATTENTION + experts + router)


def test_ablation_counts_its_rounds(tmp_path: Path) -> None:
    """Two rounds over 4 and 3 layers on 3 of 6 windows, in each the logits of every model and of the dense one."""
    plan = _plan(tmp_path, "depth: {remove: 2, criterion: {kind: perplexity, windows: 3}}")
    passes = (4 / 2 + 1 + 3 / 2 + 1) * 3 / 6
    head = 2 * 32 * 128 * (3 * 31) * (5 + 4)
    assert _work(plan, "ablation: leaving layers out").products == passes * plan.work.forward.products + head


def test_ablation_of_few_candidates_on_short_windows(tmp_path: Path) -> None:
    """Two layers are left out again, then each span of two, on half of each window; the last 4 tokens are predicted."""
    criterion = "{kind: divergence, windows: 3, tokens: 16, greedy: true, candidates: 2}"
    plan = _plan(tmp_path, f"depth: {{remove: 2, criterion: {criterion}}}")
    spans = 3 * (2 / 4) / 2 + 2 / 4 + 2  # also the layers that were chosen one by one, and the whole model twice
    passes = (4 / 2 + 1 + 2 / 2 + 1 + spans) * 3 / 6 / 2
    head = 2 * 32 * 128 * (3 * 4) * (5 + 3 + 5)
    assert _work(plan, "ablation: leaving layers out").products == passes * plan.work.forward.products + head


def test_pass_2_of_narrower_layers(tmp_path: Path) -> None:
    """With dense states from pass 1 a layer runs once uncut; then only the MLP's last product is computed."""
    plan = _plan(tmp_path, "width: {neurons: 64}")
    work = _work(plan, "pass 2: cut and refit")
    assert work.products == pytest.approx(TOKENS * 4 * (ATTENTION + MLP - 2 * 32 * 32 + 2 * 64 * 32))
    gram, moments, sketches = 1.25 * 64**2, 2 * 2 * 64 * 32, 2 * 2 * (64 * 32 + 32 * 32)
    assert work.sums == TOKENS * 4 * (gram + moments + sketches)
    final, tried = 64**3 / 3 + 2 * 64**2 * 32, 4 * (64**3 / 3 + 4 * 2 * 64**2 * 32)
    assert work.solves == pytest.approx(4 * (final + tried))


def test_pass_2_without_a_refit_and_without_stored_states(tmp_path: Path) -> None:
    """Layers before the first cut run once, the one before the gap in both models, the removed one as dense."""
    plan = _plan(tmp_path, NOTHING)
    assert [part.name for part in plan.work.parts] == ["pass 2: cut and refit", "saving", "verification"]
    assert _work(plan, "pass 2: cut and refit").products == pytest.approx(TOKENS * 5 * (ATTENTION + MLP))


def test_more_settings_take_longer(tmp_path: Path) -> None:
    """Refits of up projections and heads add runs and sums, and sparsity adds solutions."""

    def pass_2(sections: str) -> Work:
        return _work(_plan(tmp_path, f"width: {{neurons: 64{sections}"), "pass 2: cut and refit")

    plain = pass_2("}")
    up, heads = pass_2("}\nrefit: {up: true}"), pass_2(", heads: 1}")
    assert min(up.products, heads.products) > 1.2 * plain.products
    assert min(up.sums, heads.sums) > 1.2 * plain.sums
    sparse = pass_2("}\nsparsity: {pattern: '2:4'}\nrefit: false")  # an inverse and five products a matrix
    order = 64**3 + 50 * 16 * 16 * 16 * 32  # an inverse, and 16 assignments of 16 inputs to 16 groups
    assert sparse.solves == 4 * (64**3 + 10 * 64**2 * 32 + order), "only the down projection is large enough"


def test_training_takes_epochs_of_three_passes(tmp_path: Path) -> None:
    """Training adds forward and backward passes of every layer that is cut, and its gradients to the memory."""
    plans = [_plan(tmp_path, f"width: {{neurons: 64}}\nrefit: {{block: {on}}}") for on in ("false", "true")]
    plain, trained = (_work(plan, "pass 2: cut and refit") for plan in plans)
    cut = ATTENTION + MLP * 64 // 96
    assert trained.products - plain.products == pytest.approx(TOKENS * 4 * cut * 3 * EPOCHS)
    assert plans[1].memory.statistics > plans[0].memory.statistics
    assert any("refit.block" in note for note in plans[1].notes)


def test_rates_turn_work_into_seconds(tmp_path: Path) -> None:
    """Each kind of work has its rate; processes divide tokens, not solutions, files and the evaluation."""
    work = Work(products=2e9, sums=1e9, solves=5e8, stream=1e10, weights=1e9, files=2e8, calls=1e6, starts=1)
    parts = [Part(step="one", name="one", work=work, shared=True), Part(step="two", name="two", work=work)]
    alone = durations(parts, GIVEN, device="cpu", processes=1, loading=7.0)
    assert alone.by_step() == {"one": 16.0, "two": 16.0}
    shared = durations(parts, GIVEN, device="cpu", processes=2, loading=7.0)
    assert shared.by_step() == {"one": 13.5, "two": 16.0}
    assert (shared.total, shared.dominant) == (29.5, "two")
    assert _timed(_plan(tmp_path, NOTHING)).by_step()["verification"] > 7


def test_tasks_have_no_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of requests is not known before the tasks are loaded; the table says so, and what takes longest."""
    text = "{dataset: text.txt, samples: 4, sequence_length: 32}"
    sections = f"{{tasks: [arc_easy], perplexity: {text}, generation: {{samples: 4, new_tokens: 8}}, speed: {{}}}}"
    plan = _plan(tmp_path, f"depth: {{remove: 1}}\nevaluation: {sections}")
    found = _timed(plan)
    assert found.unknown == ("tasks: dense", "tasks: pruned")
    assert found.by_step().keys() == {"pass 1", "ablation", "pass 2", "saving", "verification", "evaluation"}
    assert [part.name for part in found.parts if part.step == "evaluation"] == [
        *("held-out text: cut", "held-out text: dense", "held-out text: pruned"),
        *("tasks: dense", "free generation: dense", "tasks: pruned", "free generation: pruned", "speed"),
    ]
    print_plan(plan.model_copy(update={"durations": found}), PlainConsole())
    said = " ".join(capsys.readouterr().out.split())
    assert "and the tasks of the evaluation, whose number of requests is not known yet" in said
    assert "verification takes longest" in said
    assert "an estimate, from the operations of each step and the measured speed of one (2 B operations/s)" in said
    print_plan(plan, PlainConsole())
    assert "Time:" not in capsys.readouterr().out


def test_options_of_the_command_add_parts(tmp_path: Path) -> None:
    """The calibration check takes as long as scoring, and plain forward passes run before and after pruning."""
    plan = _plan(tmp_path, "depth: {remove: 1}\nevaluation: {generation: false}")
    found = _timed(plan, measures_forward=True, checks_calibration=True)
    order = ["plain forward pass", "pass 1", "ablation", "calibration check", "pass 2", "saving", "verification"]
    assert [part.step for part in found.parts] == [*order, "plain forward pass"]
    scoring = found.by_step()["pass 1"] + found.by_step()["ablation"]
    assert found.by_step()["calibration check"] == pytest.approx(scoring, abs=0.002)  # each is rounded


def test_the_calibration_check_scores_each_source(tmp_path: Path) -> None:
    """Its criteria are solved once for each of several sources, and cost nothing where pass 1 scores by source."""
    sources = {"dataset": None, "sources": [{"dataset": "a.txt"}, {"dataset": "b.txt"}]}
    found = {}
    for name, changed in (("halves", {}), ("pooled", sources), ("combined", sources | {"combine": "worst"})):
        plan = _plan(tmp_path, "width: {neurons: 64, criterion: {kind: obs}}", calibration=changed)
        found[name] = plan.work.check, _work(plan, "pass 1: scoring layers")
    for name, solves in (("halves", 1), ("pooled", 2)):
        check, scoring = found[name]
        assert check is not None
        assert (check.products, check.solves) == (scoring.products, solves * scoring.solves)
    assert found["combined"][0] is None


def test_rates_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has them for the next command; another type is measured again; a damaged file is replaced."""
    file, cpu = tmp_path / "cache" / "rates.json", torch.device("cpu")
    measured: list[torch.dtype] = []

    def measure(device: torch.device, dtype: torch.dtype, *, size: int) -> Rates:
        measured.append(dtype)
        return GIVEN

    monkeypatch.setattr(rates, "rates_file", lambda: file)
    monkeypatch.setattr(rates, "measure", measure)
    assert rates.known_rates(cpu, torch.float32, hidden=32) is None
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        assert rates.rates_of(cpu, dtype, hidden=32) == GIVEN
    assert measured == [torch.float32, torch.bfloat16]
    assert rates.known_rates(cpu, torch.float32, hidden=40) == GIVEN  # the same matrix is measured for it
    assert len(json.loads(file.read_text())) == 2
    file.write_text('{"one": 3}')
    assert rates.rates_of(cpu, torch.float32, hidden=32) == GIVEN
    assert len(measured) == 3


def test_measured_rates_are_positive() -> None:
    """The measurement itself gives a rate of every kind, for a type that many CPUs emulate as well."""
    found = rates.measure(torch.device("cpu"), torch.bfloat16, size=256)
    assert all(value > 0 for value in found.model_dump().values())


def test_a_busy_machine_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs take their share of the processors; a GPU is not shared with them."""
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 9.0, 9.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert slowdown(torch.device("cpu")) == 2.0
    assert slowdown(torch.device("cuda")) == 1.0
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 9.0, 9.0))
    assert slowdown(torch.device("cpu")) == 1.0
    part = Part(step="one", name="one", work=Work(products=2e9))
    found = durations([part], GIVEN, device="cpu", processes=1, slowdown=2.5)
    assert (found.total, found.slowdown) == (2.5, 2.5)


def test_a_plan_of_the_service_measures_a_cpu_and_expects_what_earlier_runs_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU is measured for the first plan; a GPU only by a run; a run's times correct the next plan of its model."""
    plan, recipe = _plan(tmp_path, "depth: {remove: 1}"), Recipe.parse(f"{BASE}depth: {{remove: 1}}\n")
    monkeypatch.setattr(rates, "rates_file", lambda: tmp_path / "rates.json")
    monkeypatch.setattr(rates, "measure", lambda *_, **__: GIVEN)
    monkeypatch.setattr(timing, "slowdown", lambda _: 1.0)
    monkeypatch.setattr(measured, "_path", lambda: tmp_path / "measured_times.json")
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(timing, "local_device", lambda: torch.device("meta"))
        assert timing.with_expected_durations(plan, recipe).durations is None
    first = timing.with_expected_durations(plan, recipe).durations
    assert first is not None
    assert first.parts == durations(plan.work.parts, GIVEN, device="cpu", processes=1).parts
    verified = next(part for part in first.parts if part.name == "verification").seconds
    assert verified is not None
    measured._keep(measured._name(first, recipe), first.expected(), times={"verification": 3 * verified}, settings="")
    second = timing.with_expected_durations(plan, recipe).durations
    assert second is not None
    assert second.total == pytest.approx(first.total + 2 * verified, abs=0.01)
