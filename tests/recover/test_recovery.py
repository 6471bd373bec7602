"""A recovery: better on held-out text, never worse, resumed as if uninterrupted, with zeros that stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.recovering import random_windows, recovery, save_pair
from safetensors.torch import load_file

from llmprune.recover.recovery import Recovered


def weights(recovered: Recovered) -> dict[str, torch.Tensor]:
    """Return the saved weights."""
    assert recovered.folder is not None
    return load_file(recovered.folder / "model.safetensors")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_brings_the_model_nearer_to_the_dense_one(
    pair: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    """The saved weights are nearer to the dense model on windows that were not trained on, and load as they are."""
    found = recovery(pair, tmp_path, method=method, tokens=24 * 64, windows=random_windows(24)).run()
    first, best = found.progress.checks[0], found.progress.checks[-1]
    assert sum(best.divergence.values()) < sum(first.divergence.values())
    assert found.progress.best_step > 0
    before, after = load_file(pair[1] / "model.safetensors"), weights(found)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_a_training_that_helps_nothing_leaves_the_repaired_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A model that cannot come nearer to the dense one, because it is the dense one, is not written again."""
    found = recovery((pair[0], pair[0]), tmp_path).run()
    assert found.folder is None
    assert found.progress.best_step == 0


class StopError(Exception):
    """The end of a run that is killed."""


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(
    pair: tuple[Path, Path], tmp_path: Path, method: str, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a run that is killed after any step and run again equal those of an uninterrupted run."""
    whole = weights(recovery(pair, tmp_path / "whole", method=method).run())
    steps = 0
    step = torch.optim.AdamW.step

    def stop(self: torch.optim.AdamW, closure: None = None) -> None:
        nonlocal steps
        if steps == killed_after:
            raise StopError
        steps += 1
        step(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        with pytest.raises(StopError):
            recovery(pair, tmp_path / "killed", method=method).run()
    resumed = weights(recovery(pair, tmp_path / "killed", method=method).run())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_that_are_computed_again_change_nothing(
    pair: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    """Weights are equal to the bit, whether the activations of a layer were kept or not."""
    kept, again = (
        weights(recovery(pair, tmp_path / str(save), method=method, save_memory=save).run()) for save in (False, True)
    )
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_zeros_stay(tmp_path: Path, method: str) -> None:
    """Weights of sparse matrices that are zero before the training are zero in the saved file, and others are not."""
    dense, repaired = save_pair(tmp_path / "pair", "llama", zeros=True)
    found = weights(recovery((dense, repaired), tmp_path / "run", method=method).run())
    before = load_file(repaired / "model.safetensors")
    sparse = [name for name in before if "mlp" in name]
    assert sparse
    for name in sparse:
        assert torch.equal(before[name] == 0, found[name] == 0)
        assert not torch.equal(before[name], found[name])


@pytest.mark.parametrize("embeddings", [False, True])
def test_embeddings_and_head_are_trained_if_asked_for(
    pair: tuple[Path, Path], tmp_path: Path, *, embeddings: bool
) -> None:
    """Without the setting they are what they were, and the last norm is trained all the same."""
    found = weights(recovery(pair, tmp_path, embeddings=embeddings).run())
    before = load_file(pair[1] / "model.safetensors")
    outside = {name for name in before if ".layers." not in name}
    changed = {name for name in outside if not torch.equal(before[name], found[name])}
    assert changed == (outside if embeddings else {name for name in outside if name.endswith("norm.weight")})


def test_saved_weights_have_the_types_of_the_file(tmp_path: Path) -> None:
    """A bfloat16 model is trained in float32 and saved in bfloat16; its probe is what the saved model answers."""
    pair = save_pair(tmp_path / "pair", "qwen2", dtype=torch.bfloat16)
    found = recovery(pair, tmp_path / "run").run()
    assert {tensor.dtype for tensor in weights(found).values()} == {torch.bfloat16}


def test_an_exploding_loss_goes_back_with_a_smaller_step(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A learning rate that breaks the model is halved until it does not, and the model is not worse than before."""
    found = recovery(pair, tmp_path, learning_rate=0.9, warmup=0.0, embeddings=True).run()
    assert found.progress.setbacks > 0
    assert found.progress.scale < 1
    assert all(torch.tensor(list(check.divergence.values())).isfinite().all() for check in found.progress.checks)


@pytest.mark.parametrize("loss", ["distillation", "language_model"])
def test_text_alone_or_the_dense_model_can_teach(pair: tuple[Path, Path], tmp_path: Path, loss: str) -> None:
    """Both losses lower the training loss."""
    losses = [check.loss for check in recovery(pair, tmp_path, loss=loss).run().progress.checks if check.loss]
    assert losses[-1] < losses[0]
