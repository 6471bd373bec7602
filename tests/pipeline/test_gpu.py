"""Runs on a CUDA device: passes on every placement, whole runs, memory limits, 2:4 kernels, a process for each GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.commands import command, report_in, save_model, write_recipe, write_text
from helpers.whole_runs import run_with_every_measure
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.model import ModelSource
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.testing import VOCABULARY, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.fixture(scope="module", params=["llama", "gemma2", "mixtral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(request.param).save_pretrained(folder)
    return folder


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Compute on the CPU, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@contextmanager
def _device_memory(limit: int) -> Iterator[None]:
    """Let this process use ``limit`` bytes of the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory, 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def _split(layers_on_cpu: int) -> dict[str, str | int]:
    ends = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    return ends | {f"model.layers.{index}": "cpu" if index < layers_on_cpu else 0 for index in range(4)}


def _pruned_logits(checkpoint: Path, device_map: object, ids_NL: Tensor) -> Tensor:
    dense = open_decoder(ModelSource.model_validate({"id": str(checkpoint), "device_map": device_map}))
    anatomy = discover(dense.skeleton.config)
    cut = Cut(4, (0, 1, 3))
    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    _, forward = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(), write=lambda *_: None).run(ids_NL, 2)
    return forward.logits(0).cpu()


@pytest.mark.parametrize("layers_on_cpu", [0, 2, 4])
def test_placement_does_not_change_the_result(layers_on_cpu: int, checkpoint: Path) -> None:
    """On the GPU, split over GPU and CPU, and offloaded to the CPU: the pruned model is that of the CPU."""
    ids_NL = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    with _without_gpu():
        on_cpu = _pruned_logits(checkpoint, "cpu", ids_NL)
    placed = _pruned_logits(checkpoint, _split(layers_on_cpu), ids_NL)
    torch.testing.assert_close(placed, on_cpu, rtol=1e-3, atol=1e-3)


def test_hidden_states_lie_in_pinned_memory(checkpoint: Path) -> None:
    """Hidden states between layers leave the GPU, into memory that it can copy from directly."""
    dense = open_decoder(ModelSource(id=str(checkpoint), device_map="auto"))
    forward = LayerwiseForward(dense, torch.randint(3, VOCABULARY, (4, 24)), batch_size=2)
    with dense.layer(0) as layer:
        forward.pass_through(0, layer)
    assert all(hidden_BLD.is_pinned() for hidden_BLD in forward.hidden_states)


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """Twice the layers, read from files at every visit, take no more of the GPU while they are scored."""
    peaks = []
    for layers in (4, 8):
        folder = tmp_path / str(layers)
        tiny_model("llama", num_hidden_layers=layers, hidden_size=256, intermediate_size=2048).save_pretrained(folder)
        dense = open_decoder(ModelSource(id=str(folder), device_map="cpu"))
        ids_NL = torch.randint(3, VOCABULARY, (4, 24))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        score(
            dense,
            discover(dense.skeleton.config),
            criteria=ScoringCriteria(depth=BlockInfluence(), width=Activation()),
            calibration=CalibrationBatches(ids_NL, 2),
        )
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.1 * peaks[0]


def test_sparse_bench_measures_what_it_runs(tmp_path: Path) -> None:
    """On the GPU 2:4 products equal dense ones, take less memory, and both ways are timed, alone and end to end."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    for index in range(4):
        for name, parameter in model.model.layers[index].named_parameters():
            if name.endswith("proj.weight"):
                parameter.data.view(-1, 4)[:, ::2] = 0
    model.half().save_pretrained(tmp_path / "sparse")
    done = command(
        "bench", tmp_path / "sparse", "--sparse", "--contexts", "32", "--new-tokens", "4", "-o", tmp_path / "b"
    )
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "b").read_text())
    assert {(one["outputs"], one["inputs"]) for one in figures["products"]} >= {(512, 256), (256, 512)}
    assert all(one["difference"] < 0.01 and one["dense"] > 0 and one["sparse"] > 0 for one in figures["products"])
    assert figures["model_size"]["weights"] < figures["base_size"]["weights"]
    assert len(figures["points"]) == 2


def test_a_whole_run_gives_the_figures_of_the_cpu(tmp_path: Path) -> None:
    """Heads, 2:4 sparsity, verification in a fresh process, tasks and generation: on the GPU as on the CPU."""
    save_model(tmp_path / "dense")
    write_text(tmp_path / "text.txt")
    with _without_gpu():
        on_cpu = run_with_every_measure(tmp_path, "cpu", device_map="cpu", here=False)
    on_gpu = run_with_every_measure(tmp_path, "gpu", device_map="auto", here=False)
    assert on_gpu["sparsity"]["violations"] == 0
    assert on_gpu["provenance"]["device"] == torch.cuda.get_device_name(0)
    assert all(step["peak_device"] > 0 for step in on_gpu["steps"] if step["name"] in ("pass 1", "pass 2"))
    for side in ("dense", "pruned"):
        assert on_gpu["perplexity"][side] == pytest.approx(on_cpu["perplexity"][side], rel=0.02)


def test_a_run_ends_with_less_memory_than_it_took(tmp_path: Path) -> None:
    """With 60 % of the memory that it took at first, a run divides its batches and ends with an equally good model."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "max_position_embeddings": 256}
    base, text = save_model(tmp_path / "dense", **sizes), write_text(tmp_path / "text.txt", paragraphs=1000)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        base,
        text,
        calibration={"dataset": str(text), "samples": 64, "sequence_length": 256, "batch_size": 64},
        width={"neurons": 1024},
    )
    reports = []
    peak = 0
    for limit in (None, 0.6):
        with _device_memory(int(limit * peak) if limit else torch.cuda.get_device_properties(0).total_memory):
            done = command("run", recipe, "--output", tmp_path / "out", "--fresh")
        assert done.code == 0, done.err
        reports.append(report_in(tmp_path / "out"))
        peak = max(step["peak_device"] for step in reports[-1]["steps"] if step["name"] in ("pass 1", "pass 2"))
    errors = [[layer["error_refit"] for layer in report["layers"] if not layer["removed"]] for report in reports]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_starts_a_process_for_each_gpu(tmp_path: Path) -> None:
    """One command works on every GPU, and its model is as good as that of one GPU."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        save_model(tmp_path / "dense"),
        write_text(tmp_path / "text.txt"),
        calibration={"dataset": str(tmp_path / "text.txt"), "samples": 16, "sequence_length": 32},
    )
    errors = []
    for name, devices in (("all", "all"), ("one", 1)):
        options = ["--output", str(tmp_path / name), "--set", f"devices={devices}"]
        done = subprocess.run(
            [sys.executable, "-m", "llmprune", "run", str(recipe), *options], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        report = report_in(tmp_path / name)
        assert report["provenance"]["processes"] == (torch.cuda.device_count() if devices == "all" else 1)
        errors.append([layer["error_refit"] for layer in report["layers"] if not layer["removed"]])
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
