"""Whole runs and measures on simulated GPUs: models and their inputs are on the same device."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command, report_in, save_model, write_text
from helpers.devices import simulated_devices
from helpers.placements import spread
from helpers.tiny import tiny_tokenizer
from helpers.whole_models import side_by_side
from helpers.whole_runs import run_with_every_measure
from torch import Tensor

from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.evaluation.bench.generation_speed import time_generation
from llmprune.evaluation.perplexity import compare_predictions
from llmprune.pipeline.step_costs import dense_forward_pass
from llmprune.recipe.evaluation import Generation
from llmprune.recipe.model import ModelSource
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


def _load(folder: Path, device_map: Any = "auto") -> Any:
    return load_model(ModelSource(id=str(folder), device_map=device_map))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer and text, and ``cpu``, the run of it on the CPU."""
    root = tmp_path_factory.mktemp("runs")
    save_model(root / "dense")
    write_text(root / "text.txt")
    run_with_every_measure(root, "cpu", device_map="cpu")
    return root


@pytest.mark.parametrize(("devices", "name"), [(1, "auto"), (2, "split")])
def test_a_whole_run_does_not_depend_on_the_devices(devices: int, name: str, workspace: Path) -> None:
    """Scores, refit, sparsity, verification, tasks and free generation: the figures of the CPU.

    On one GPU, where no hook of accelerate moves what the code forgets; and with layers on two, on the CPU and on disk.
    """
    device_map = "auto" if devices == 1 else spread(workspace / "dense")
    with simulated_devices(devices):
        found = run_with_every_measure(workspace, name, device_map=device_map)
    on_cpu = report_in(workspace / "cpu")
    for part in ("layers", "perplexity", "generation", "tasks", "sparsity", "verification"):
        assert found[part] == on_cpu[part], part
    assert "simulated" in found["provenance"]["device"]


def test_the_plain_forward_runs_where_the_model_is(llama: Path) -> None:
    """A model that the recipe keeps on the CPU is timed there, on a machine with a GPU too."""
    with simulated_devices(1):
        for device_map in ("cpu", "auto"):
            dense_forward_pass(_load(llama, device_map), IDS, batch_size=2)


def test_prompts_are_on_the_models_device_before_generation(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else transformers copies them for every token, in the time that is measured."""
    with simulated_devices(1):
        model, places = _load(llama), []
        generate = model.generate
        monkeypatch.setattr(
            model, "generate", lambda ids, **rest: places.append(ids.device.type) or generate(ids, **rest)
        )
        settings = Generation(prompts="held_out", samples=2, prompt_tokens=2, new_tokens=8)
        side_by_side(model, model, tokenizer=tiny_tokenizer(), windows_NL=IDS, settings=settings)
        time_generation(model, IDS[:1], new_tokens=2)
    assert places == ["cuda"] * 3


def test_predictions_of_models_on_two_devices_are_compared(llama: Path) -> None:
    """The pruned model may be loaded to the GPU that the dense one leaves free."""
    found = []
    for devices, places in ((None, ("cpu", "cpu")), (2, ({"": 0}, {"": 1}))):
        with simulated_devices(devices) if devices else nullcontext():
            found.append(
                compare_predictions(
                    *(open_decoder(ModelSource(id=str(llama), device_map=place)) for place in places),
                    windows_NL=IDS,
                    batch_size=2,
                )
            )
    assert found[0] == found[1]


def test_the_sparse_bench_puts_the_model_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two GPUs, over which other commands split a model."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    for name, parameter in model.model.layers.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data.view(-1, 4)[:, ::2] = 0
    model.half().save_pretrained(tmp_path)
    places: set[str] = set()

    def keep_dense(weight: Tensor) -> Tensor:  # the kernels are a real GPU's
        places.add(str(weight.device))
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", keep_dense)
    with simulated_devices(2):
        done = command("bench", tmp_path, "--sparse", "--contexts", "8", "--new-tokens", "2", "--repeats", "1")
    assert done.code == 0, done.err
    assert places == {"cuda:0"}
