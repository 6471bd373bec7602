"""Layer-wise backward pass, and the criteria that use it.

Shapes: B batch, L sequence length, D hidden size, F neurons.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import IDS, recipe_of, scores_of, store_in
from helpers.tiny import structure_of
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hooks import inputs_of, outputs_of
from llmprune.common.errors import CalibrationError, DeviceMemoryError, ModelError, RecipeError
from llmprune.criteria.base import WidthCriterion
from llmprune.criteria.width.share import Share
from llmprune.criteria.width.share_taylor import ShareTaylor
from llmprune.criteria.width.taylor import Taylor
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.score.forward_pass import score
from llmprune.score.gradients import windows_for_gradients
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.testing import tiny_model


@pytest.mark.parametrize(
    ("family", "weight_of"),
    [
        ("llama", lambda model, layer: model.model.layers[layer].mlp.down_proj.weight),
        ("gpt2", lambda model, layer: model.transformer.h[layer].mlp.c_proj.weight.T),
    ],
)
def test_layerwise_gradients_are_those_of_the_whole_model(
    tmp_path: Path, family: str, weight_of: Callable[[Any, int], Tensor]
) -> None:
    """Layer by layer, Σ x · ∂loss/∂x equals Σ w · ∂loss/∂w of the whole model differentiated at once."""
    model = tiny_model(family)
    scores = scores_of(model, Taylor(absolute="all"), tmp_path)
    model.requires_grad_(True)
    logits = model(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="sum")
    weights = [weight_of(model, layer) for layer in range(4)]
    bases = [weight if weight.is_leaf else weight._base for weight in weights]
    gradients = torch.autograd.grad(loss, [base for base in bases if base is not None])
    for layer, (weight_DF, gradient) in enumerate(zip(weights, gradients, strict=True)):
        gradient_DF = gradient if gradient.shape == weight_DF.shape else gradient.T
        wanted_F = (weight_DF * gradient_DF).sum(0).abs().detach() / IDS.numel()
        key = next(key for key in scores if key.startswith(f"{layer}."))
        torch.testing.assert_close(scores[key], wanted_F, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", [Taylor(), ShareTaylor()], ids=lambda criterion: criterion.kind)
def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, criterion: WidthCriterion) -> None:
    """Scores are the same for one window at a time and several, with hidden states in memory or in a file."""
    model = tiny_model("llama")
    wanted = scores_of(model, criterion, tmp_path, 6)
    anatomy = discover(model.config)
    store = HiddenStateStore(0, tmp_path, HiddenStateCache(tmp_path / "one", "key"))
    scores = score(
        dense_decoder(model),
        anatomy,
        criteria=ScoringCriteria(width=criterion),
        calibration=CalibrationBatches(IDS, 1, store),
    )
    for key, wanted_F in wanted.items():
        torch.testing.assert_close(scores.neurons[key], wanted_F, rtol=1e-3, atol=1e-6)


def test_relative_effects_weigh_tokens_equally(tmp_path: Path) -> None:
    """Effects are divided by the norm of each token's gradient; the last token of a window has no gradient."""
    model = tiny_model("llama")
    found, shares = (scores_of(model, criterion, tmp_path) for criterion in (ShareTaylor(), Share()))
    activations: list[Tensor] = []
    written: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(inputs_of(layer.mlp.down_proj, activations.append))
            hooks.enter_context(outputs_of(layer.mlp.down_proj, written.append))
        model.requires_grad_(True)
        logits = model(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, written)  # equal to those of the hidden states that the outputs are added to
    for index, gradient_BLD in enumerate(gradients):
        assert not gradient_BLD[:, -1].any()
        direction_BLD = torch.nn.functional.normalize(gradient_BLD, dim=-1)
        effect_BLF = activations[index] * (direction_BLD @ model.model.layers[index].mlp.down_proj.weight)
        effect_F, share_F = effect_BLF.square().mean((0, 1)).detach(), shares[f"{index}.mlp"]
        wanted_F = (effect_F / effect_F.mean() + share_F / share_F.mean()) / 2
        torch.testing.assert_close(found[f"{index}.mlp"], wanted_F, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_layers_are_prefetched_in_either_direction(order: list[int]) -> None:
    """In either direction of visits each layer is brought from the disk once, the following one in advance."""
    dense = dense_decoder(tiny_model("llama"))
    fetched: list[int] = []
    prefetched: list[int] = []

    def fetch(index: int) -> dict[str, Tensor]:
        fetched.append(index)
        return dict(dense.tensors(index))

    decoder = Decoder(dense.skeleton, fetch, placement=dense.placement, prefetch=prefetched.append)
    for index in order:
        decoder.tensors(index)
    assert prefetched == fetched == order


def test_the_backward_pass_needs_disk_space(tmp_path: Path) -> None:
    """Without disk space for the hidden states scoring is refused at its start, and by the plan if it is known."""
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match=r"no space.*raise calibration\.stream_disk"):
        score(
            dense_decoder(model),
            discover(model.config),
            criteria=ScoringCriteria(width=Taylor()),
            calibration=CalibrationBatches(IDS, 4),
        )
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        RecipeError,
        match=r"stream_disk: the backward pass of width\.criterion taylor .*, 24\.6 KB, and 1 KB are allowed",
    ):
        structure_of(recipe_of(tmp_path, {"mlp": 0.5, "criterion": {"kind": "taylor"}}, stream_disk="1KB"))


def test_a_layer_that_cannot_be_differentiated_is_named(tmp_path: Path) -> None:
    """A layer that detaches its input is an error that names the layer and the remedy."""
    with pytest.raises(ModelError, match=r"layer 2 \(LlamaDecoderLayer\) cannot be differentiated; choose"):
        _score_without_gradients_in_layer_2(ScoringCriteria(width=Taylor()), tmp_path)


def test_layers_without_gradients_are_scored_by_the_forward_pass(tmp_path: Path) -> None:
    """The default criterion then scores by ``share``, those after the layer by both; the scores say so, saved too."""
    found = _score_without_gradients_in_layer_2(ScoringCriteria(width=ShareTaylor()), tmp_path)
    model = tiny_model("llama")
    shares, both = (scores_of(model, criterion, tmp_path) for criterion in (Share(), ShareTaylor()))
    for layer in range(4):
        wanted = both if layer == 3 else shares
        torch.testing.assert_close(found.neurons[f"{layer}.mlp"], wanted[f"{layer}.mlp"], rtol=1e-4, atol=1e-7)
    assert re.search(r"scored without gradients: layers 0 to 2: layer 2 \(\w+\) cannot be", found.notes[0])
    found.save(tmp_path / "scores.safetensors")
    assert Scores.load(tmp_path / "scores.safetensors").notes == found.notes


def _score_without_gradients_in_layer_2(criteria: ScoringCriteria, folder: Path) -> Scores:
    model = tiny_model("llama")
    decoder = dense_decoder(model)
    mlp = decoder.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden.detach())
    calibration = CalibrationBatches(IDS, 4, store_in(folder))
    return score(decoder, discover(model.config), criteria=criteria, calibration=calibration)


def test_the_default_criterion_needs_no_disk_space(tmp_path: Path) -> None:
    """Without space for hidden states it scores by ``share``, and the scores say why."""
    model = tiny_model("llama")
    found = score(
        dense_decoder(model),
        discover(model.config),
        criteria=ScoringCriteria(width=ShareTaylor()),
        calibration=CalibrationBatches(IDS, 4),
    )
    wanted = scores_of(model, Share(), tmp_path)
    assert all(torch.equal(found.neurons[key], scores_F) for key, scores_F in wanted.items())
    assert "no space" in found.notes[0]


def test_the_default_criterion_needs_no_memory_for_gradients(tmp_path: Path) -> None:
    """Where a single window's backward pass does not fit, it scores by ``share``, and the scores say why."""
    model = tiny_model("llama")

    def run_out(_: object) -> NoReturn:
        raise DeviceMemoryError("pass 1: gradients, a single window at a time, on cuda:0: GPU 0 is out of memory")

    found = score(
        dense_decoder(model),
        discover(model.config),
        criteria=ScoringCriteria(width=ShareTaylor()),
        calibration=CalibrationBatches(IDS, 4, gradients=run_out),
    )
    wanted = scores_of(model, Share(), tmp_path)
    assert all(torch.equal(found.neurons[key], scores_F) for key, scores_F in wanted.items())
    assert "a single window at a time, on cuda:0" in found.notes[0]


def test_processes_share_windows_that_are_fewer_than_they(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process takes each of them, so that the mean over all processes is that of one."""
    monkeypatch.setattr("llmprune.score.gradients.world_size", lambda: 3)
    criteria, generated_N = ScoringCriteria(width=ShareTaylor()), torch.arange(6) % 3 == 1
    numbers_N = windows_for_gradients(criteria, 6, generated_N=generated_N)
    assert [numbers_N[rank::3].tolist() for rank in range(3)] == [[1, 4]] * 3
    assert not len(windows_for_gradients(criteria, 6, generated_N=torch.zeros(6, dtype=torch.bool)))


def test_gradients_are_of_the_windows_that_the_model_wrote(tmp_path: Path) -> None:
    """Some of them have a backward pass for the default criterion, and all windows for one that requires it."""
    criteria, generated_N = ScoringCriteria(width=ShareTaylor(gradient_windows=2)), torch.arange(12) % 3 == 1
    assert windows_for_gradients(criteria, 12, generated_N=generated_N).tolist() == [1, 7]
    assert not len(windows_for_gradients(criteria, 12, generated_N=None))
    required = ScoringCriteria(width=Taylor())
    assert windows_for_gradients(required, 12, generated_N=generated_N).tolist() == list(range(12))
    assert not len(windows_for_gradients(ScoringCriteria(width=Share()), 12, generated_N=generated_N))
    model = tiny_model("llama")
    own = CalibrationBatches(IDS[[0, 3]], 1, store_in(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    found = score(
        dense_decoder(model),
        discover(model.config),
        criteria=criteria,
        calibration=CalibrationBatches(IDS, 4, gradients=lambda work: work(own)),
    )
    on_own = _scores_on(model, IDS[[0, 3]], tmp_path)
    shares, own_shares = scores_of(model, Share(), tmp_path), _scores_on(model, IDS[[0, 3]], tmp_path, Share())
    for key, score_F in found.neurons.items():
        effect_F = 2 * on_own[key] - own_shares[key] / own_shares[key].mean()
        wanted_F = (effect_F + shares[key] / shares[key].mean()) / 2
        torch.testing.assert_close(score_F, wanted_F, rtol=1e-3, atol=1e-4)


def _scores_on(
    model: Any, windows_NL: Tensor, folder: Path, criterion: WidthCriterion | None = None
) -> dict[str, Tensor]:
    return score(
        dense_decoder(model),
        discover(model.config),
        criteria=ScoringCriteria(width=criterion or ShareTaylor()),
        calibration=CalibrationBatches(windows_NL, 4, store_in(folder)),
    ).neurons
