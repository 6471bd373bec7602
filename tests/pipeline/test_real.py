"""The real SmolLM2-135M-Instruct, end to end with a short calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmprune import Recipe, Report, run

ROOT = Path(__file__).parents[2]
SHORT = (
    "calibration.samples=8",
    "calibration.sequence_length=128",
    "calibration.self_generated=0",
    "evaluation.perplexity.samples=4",
    "evaluation.perplexity.sequence_length=128",
    "evaluation.generation.samples=2",
    "evaluation.generation.new_tokens=8",
    "evaluation.limit=10",
    f"evaluation.include_path={ROOT / 'eval/tasks'}",
    "evaluation.speed.new_tokens=4",
    "evaluation.speed.repeats=1",
)

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """The quickstart recipe on little text."""
    folder = tmp_path_factory.mktemp("real")
    return run(Recipe.load(ROOT / "recipes/quickstart.yaml", SHORT), folder), folder


def test_sizes_are_exact(pruned: tuple[Report, Path]) -> None:
    """Two of 30 layers and a quarter of every MLP: the counts of the files are those of the plan."""
    report, folder = pruned
    stored = load_file(folder / "model/model.safetensors")
    plan = json.loads((folder / "plan.json").read_text())
    assert report.dense.parameters == 134_515_008
    assert sum(tensor.numel() for tensor in stored.values()) == report.pruned.parameters
    assert plan["pruned"]["parameters"] == report.pruned.parameters
    assert "lm_head.weight" not in stored


def test_fresh_process_gives_the_same_logits(pruned: tuple[Report, Path]) -> None:
    """Plain transformers, on the same machine, differs by nothing at all."""
    verification = pruned[0].verification
    assert verification.largest_logit_difference == 0
    assert verification.cached_generation_equal


def test_refit_repairs(pruned: tuple[Report, Path]) -> None:
    """On held-out text the cut costs perplexity, and the refit wins a good part of it back."""
    figures = pruned[0].perplexity
    assert figures is not None
    assert figures.cut is not None
    assert figures.dense < figures.pruned < figures.cut


def test_every_refit_lowers_the_error(pruned: tuple[Report, Path]) -> None:
    """On the calibration text no layer is further from the dense one after its refit."""
    kept = [layer for layer in pruned[0].layers if not layer.removed]
    assert len(kept) == 28
    assert all(layer.error_refit < layer.error_cut for layer in kept if layer.error_refit and layer.error_cut)


def test_tasks_and_speed_are_measured(pruned: tuple[Report, Path]) -> None:
    """Dense and pruned were asked the same questions, and both were timed."""
    report, _ = pruned
    (task,) = report.tasks
    assert (task.task, task.samples) == ("llmprune_agreement", 10)
    assert task.dense > 0.7
    assert report.speed is not None
    assert report.speed.dense > 0
