"""On a GPU no step waits for it once a batch, and only hidden states and token ids are copied to it for every batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.devices import CopyKind, SimulatedDevices, simulated_devices
from helpers.scored import store_in

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.criteria.depth.angular import Angular
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.residual import Residual
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.flap import Flap
from llmprune.criteria.width.taylor import Taylor
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Decoder
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.model import ModelSource
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))
LAYERS = 4
Act = Callable[[Decoder, int], None]  # from a model and a batch size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and a tiny Mixtral on disk."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        tiny_model(family).save_pretrained(root / family)
    return root


def _seen(folder: Path, act: Act, batches: int) -> SimulatedDevices:
    """Waits and copies of a run on a GPU in so many batches, that of loading the model left out."""
    with simulated_devices(1) as devices:
        dense = open_decoder(ModelSource(id=str(folder)))
        for counter in (devices.waits, devices.copies):
            counter.clear()
        act(dense, len(IDS) // batches)
    return devices


def _growing(few: Counter[str], many: Counter[str], *rooms: str) -> dict[str, int]:
    """Lines of these rooms with more in more batches, and how many more."""
    grown = {line: many[line] - few[line] for line in many if many[line] > few[line]}
    return {line: more for line, more in grown.items() if line.startswith(rooms)}


def _score(**criteria: Any) -> Act:
    def act(dense: Decoder, batch_size: int) -> None:
        calibration = CalibrationBatches(IDS, batch_size, criteria.get("store") or CalibrationBatches(IDS, 1).store)
        wanted = ScoringCriteria(**{name: one for name, one in criteria.items() if name != "store"})
        score(
            dense,
            discover(dense.skeleton.config),
            criteria=wanted,
            calibration=calibration,
            target=DepthTarget(2),
        )

    return act


def _ablate(criterion: Any) -> Act:
    def act(dense: Decoder, batch_size: int) -> None:
        layer_ablation_scores(
            dense,
            discover(dense.skeleton.config),
            criterion=criterion,
            calibration=CalibrationBatches(IDS, batch_size),
            target=DepthTarget(1),
        )

    return act


def _prune(sparsity: Sparsity | None = None) -> Act:
    def act(dense: Decoder, batch_size: int) -> None:
        anatomy = discover(dense.skeleton.config)
        assert anatomy.heads is not None
        neurons = {f"{layer}.mlp": torch.arange(64) for layer in (0, 1, 3)}
        heads = {f"{layer}.self_attn": torch.tensor([1]) for layer in (0, 1, 3)}
        cut = Cut(LAYERS, (0, 1, 3), {"intermediate_size": 64}, neurons, kv_groups=1, heads=heads)
        pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
        settings = Pruning(
            dense,
            pruned,
            anatomy=anatomy,
            cut=cut,
            refit=Refit(up=True),
            write=lambda _, __: None,
            sparsity=sparsity,
        )
        settings.run(IDS, batch_size)

    return act


ACTS: dict[str, Act] = {
    "flap": _score(depth=Angular(), width=Flap(), heads=Flap()),
    "divergence": _ablate(Divergence(windows=16)),
    "residual": _ablate(Residual(windows=8, refit_windows=8)),
    "refit": _prune(),
    "sparse": _prune(Sparsity(pattern=0.5)),
}


@pytest.mark.parametrize("name", ACTS)
def test_waits_do_not_grow_with_batches(name: str, folder: Path) -> None:
    """Sums stay on the device until the layer is done, and indices are copied to it once."""
    few, many = (_seen(folder / "llama", ACTS[name], batches) for batches in (2, 4))
    assert not _growing(few.waits, many.waits, "score/", "criteria/", "prune/", "sparsity/", "common/")
    copied = [
        Counter({line: count for (kind, line), count in one.copies.items() if kind is CopyKind.TO_DEVICE_PAGEABLE})
        for one in (few, many)
    ]
    assert not _growing(*copied, "criteria/", "prune/", "sparsity/", "common/")


def test_gradients_are_summed_without_waits(folder: Path, tmp_path: Path) -> None:
    """The effects of neurons on the loss stay on the device too."""
    seen = []
    for batches in (2, 4):
        (tmp_path / str(batches)).mkdir()
        store = store_in(tmp_path / str(batches))
        seen.append(_seen(folder / "llama", _score(width=Taylor(), heads=Taylor(), store=store), batches).waits)
    assert not _growing(*seen, "score/", "criteria/", "common/")


def test_experts_are_counted_once_a_batch(folder: Path) -> None:
    """Outputs of all experts take one run of their block, and the host waits for the numbers of their tokens alone."""
    seen = [_seen(folder / "mixtral", _score(experts=Reap()), batches).waits for batches in (2, 4)]
    grown = _growing(*seen, "score/", "criteria/", "common/", "anatomy/")
    assert set(grown.values()) == {2 * LAYERS}  # in two more batches
    assert len(grown) <= 2  # the other one is a histogram in transformers, on which CUDA does not wait
