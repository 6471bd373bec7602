"""Whole models in evaluation: one in memory at a time, and smaller batches where a device runs out of memory."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.lm_eval_tasks import AGREEMENT, evaluated, tiny_llama
from helpers.random_inputs import windows
from helpers.tiny import tiny_tokenizer
from helpers.whole_models import side_by_side, timed

from llmprune.common.errors import DeviceError
from llmprune.common.out_of_memory import BatchSize
from llmprune.evaluation import evaluate as evaluation
from llmprune.evaluation.lm_eval.harness import EvaluatedModel, evaluate_tasks, evaluated_model
from llmprune.evaluation.prompts import Prompts
from llmprune.evaluation.whole_model import WholeModel
from llmprune.recipe.evaluation import Generation, Speed
from llmprune.recipe.model import ModelSource
from llmprune.testing import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Loads:
    """Counts loads of models, and how many are in memory at most."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.most = 0
        self._wholes: list[WholeModel] = []

    def subject(self, name: str, folder: Path, tokenizer: Any = None) -> EvaluatedModel:
        """Return a tiny model for evaluation, whose results are stored in its folder."""
        path = folder / name
        if not path.is_dir():
            tiny_llama(layers=2).save_pretrained(path)
        subject = evaluated_model(ModelSource(id=str(path)), tokenizer, folder=folder / f"{name}-tasks")
        load = subject.whole._load

        def counted() -> Any:
            self.loads[name] += 1
            self.most = max(self.most, 1 + sum(whole._model is not None for whole in self._wholes))
            return load()

        subject.whole._load = counted
        self._wholes.append(subject.whole)
        return subject


PROMPTS = Prompts(ids=((1, 2, 3, 4), (5, 6, 7)), new_tokens=8, source="here")
EVERYTHING = AGREEMENT.model_copy(
    update={
        "generation": Generation(),
        "speed": Speed(prompt_tokens=4, new_tokens=2, repeats=2),
    }
)


@pytest.mark.parametrize("together", [False, True])
def test_one_model_is_in_memory_at_a_time(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Tasks and texts of one model come before the other is loaded; only alternate timing needs both."""
    monkeypatch.setattr(evaluation, "fit_together", lambda _: together)
    loads = Loads()
    dense, pruned = (loads.subject(name, tmp_path, tokenizer) for name in ("dense", "pruned"))
    measured = evaluation.measure_models(EVERYTHING, dense, pruned=pruned, prompts=PROMPTS)
    assert loads.most == (2 if together else 1)
    assert loads.loads == {"dense": 1 if together else 2, "pruned": 1}
    assert measured.speed is not None
    assert measured.speed.alternating is together
    assert measured.generation is not None
    assert measured.generation.dense == measured.generation.pruned
    assert [count.same for count in measured.agreement] == [count.tokens for count in measured.agreement]
    assert measured.dense_tasks.tasks[0].samples == measured.pruned_tasks.tasks[0].samples
    assert measured.warnings == ()


def test_a_model_with_stored_results_is_not_loaded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tasks that were evaluated before need no weights."""
    evaluate_tasks(Loads().subject("dense", tmp_path, tokenizer), "dense", evaluation=AGREEMENT)
    loads = Loads()
    dense, pruned = (loads.subject(name, tmp_path, tokenizer) for name in ("dense", "pruned"))
    evaluation.measure_models(AGREEMENT, dense, pruned=pruned, prompts=None)
    assert loads.loads == {"pruned": 1}


class _SmallDevice:
    """Forward hook that refuses batches above a size, as a full device does."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.batches: list[int] = []

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BL = args[0] if args else kwargs["input_ids"]
        self.batches.append(len(ids_BL))
        if len(ids_BL) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")


def test_tasks_are_repeated_with_smaller_batches(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A full device halves the batch until it fits, with a warning; the answers are the same."""
    whole = AGREEMENT.model_copy(update={"batch_size": 8})
    expected = evaluated(tiny_llama(layers=1), tokenizer, whole)
    model, device = tiny_llama(layers=1), _SmallDevice(3)
    model.register_forward_pre_hook(device, with_kwargs=True)
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        found = evaluated(model, tokenizer, whole)
    assert [sample.answer_hash for sample in found.tasks[0].samples] == [
        sample.answer_hash for sample in expected.tasks[0].samples
    ]
    assert device.batches[1:3] == [4, 2]  # half of 8, and half of that
    assert set(device.batches[2:]) <= {1, 2}
    assert (
        "of the dense model's tasks ran out of memory on cuda:0 with batches of 4 requests; it was repeated with 2"
        in caplog.text
    )


def test_texts_are_repeated_with_smaller_batches() -> None:
    """Free generation halves its batches too."""
    settings = Generation(prompts="held_out", samples=4, prompt_tokens=4, new_tokens=8, batch_size=4)
    model, device = tiny_model("llama", vocab_size=260), _SmallDevice(1)
    expected = side_by_side(model, model, tokenizer=tiny_tokenizer(), windows_NL=windows(), settings=settings)
    model.register_forward_pre_hook(device, with_kwargs=True)
    found = side_by_side(model, model, tokenizer=tiny_tokenizer(), windows_NL=windows(), settings=settings)
    assert found.dense.repetition == pytest.approx(expected.dense.repetition)
    assert {4, 2, 1} == set(device.batches)


def test_a_batch_of_one_that_does_not_fit_is_explained() -> None:
    """The error names the device and what can be done; other errors pass."""

    def full(_: int) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2 GiB. GPU 1 is full. See the manual of torch"
        )

    sentences: list[str] = []
    batch = BatchSize(4, "prompts", alone=True, reductions=sentences)
    with pytest.raises(DeviceError) as found:
        batch.run("tasks", full)
    said = str(found.value)
    assert said.startswith(
        "tasks, a single prompt at a time, on cuda:1: GPU 1 is out of memory: 2 GiB more were needed; give"
    )
    assert "model.max_memory" in said
    assert "manual" not in said
    assert len(sentences) == 2

    def wrong(_: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        batch.run("tasks", wrong)


def test_models_that_do_not_fit_together_are_timed_apart() -> None:
    """All runs of one model come first, which the figures say."""
    settings = Speed(batch_size=2, prompt_tokens=8, new_tokens=2, repeats=2)
    models, order = {"dense": tiny_llama(layers=1), "pruned": tiny_llama(layers=1)}, list[str]()
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    figures = timed(models["dense"], models["pruned"], settings, together=False)
    assert [name for name, _ in groupby(order)] == ["pruned", "dense"]
    assert not figures.alternating
