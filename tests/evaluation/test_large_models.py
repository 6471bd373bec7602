"""Whole models larger than a device or than memory: parts stay in memory or on disk, and the answers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.devices import simulated_devices
from helpers.lm_eval_tasks import AGREEMENT, evaluated, tiny_llama
from helpers.random_inputs import windows
from transformers import PreTrainedModel, modeling_utils

from llmprune.checkpoint import placement
from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.placement import device_map_of_whole
from llmprune.evaluation.generation import continue_prompts
from llmprune.evaluation.greedy_agreement import follow_answers
from llmprune.evaluation.prompts import Prompts
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.evaluation import AnswerAgreement, GreedyAnswer
from llmprune.testing import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPTS = Prompts(ids=tuple(map(tuple, windows()[:3, :8].tolist())), new_tokens=8, source="here")


def _texts(model: PreTrainedModel) -> tuple[tuple[GreedyAnswer, ...], tuple[AnswerAgreement, ...]]:
    """Return a model's answers, and how it follows them when it reads them."""
    answers = continue_prompts(model, PROMPTS, batch_size=2, side="dense", reductions=[])
    return answers, follow_answers(model, PROMPTS, answers=answers, batch_size=2, reductions=[])


def _bytes_on(model: PreTrainedModel, device: str) -> int:
    return sum(one.numel() * one.itemsize for one in model.parameters() if one.device.type == device)


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, PreTrainedModel]:
    """A tiny model of the family that is asked for, on disk and in memory."""
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.mark.parametrize("saved", ["llama", "qwen3_moe"], indirect=True)
def test_a_model_larger_than_memory_is_read_from_disk(
    saved: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipe's limit, or because no more memory is free; experts that are converted while loading too."""
    folder, model = saved
    expected, size = _texts(model), model.num_parameters() * 4
    sources = [ModelSource(id=str(folder), max_memory={"cpu": int(0.7 * size)}), ModelSource(id=str(folder))]
    assert _bytes_on(load_model(sources[1]), "meta") == 0
    monkeypatch.setattr(placement, "free_memory", lambda: int(0.8 * size))
    for source in sources:
        offloaded = load_model(source)
        assert _bytes_on(offloaded, "meta") > 0.2 * size
        assert _texts(offloaded) == expected


@pytest.mark.parametrize("saved", ["llama", "qwen3_moe"], indirect=True)
def test_a_model_larger_than_a_gpu_answers_the_same(
    saved: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers are on a GPU of a part of the model's bytes, with room for activations; the others are in memory."""
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: None)  # takes a gigabyte ahead
    folder, model = saved
    expected, size = _texts(model), model.num_parameters() * 4
    with simulated_devices(1, memory=int(0.8 * size)) as devices:
        parts = load_model(ModelSource(id=str(folder)))
        resident = devices.used["cuda:0"]
        assert 0 < resident <= 0.72 * size
        assert _texts(parts) == expected


def test_the_gpus_of_all_processes_hold_a_model_that_one_does_not(tmp_path: Path) -> None:
    """Of several processes each has one GPU; what is free on the others is told to the one that verifies."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    size, source = model.num_parameters() * 4, ModelSource(id=str(tmp_path))
    with simulated_devices(2, memory=size) as devices, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        own = device_map_of_whole(source, model)
        assert devices.contexts == {0}
        together = device_map_of_whole(source, model, free={0: size, 1: size})
        assert devices.contexts == {0}
    assert {*(own or {}).values()} == {0, "cpu"}
    assert {*(together or {}).values()} == {0, 1}


def test_tasks_are_the_same_with_layers_on_disk(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """lm-eval runs a model of which a part is on disk."""
    model: Any = tiny_llama(layers=4)
    model.save_pretrained(tmp_path / "model")
    limit = {"cpu": int(0.7 * model.num_parameters() * 4)}
    offloaded = load_model(ModelSource(id=str(tmp_path / "model"), max_memory=limit))
    assert _bytes_on(offloaded, "meta") > 0
    assert evaluated(offloaded, tokenizer, AGREEMENT) == evaluated(model, tokenizer, AGREEMENT)
    assert torch.equal(offloaded(windows() % 32).logits, model(windows() % 32).logits)
