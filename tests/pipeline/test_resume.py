"""Pass 2 stopped and continued, and hidden states on file: the result is the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.decoders import dense_decoder

from llmprune.anatomy.discovery import discover
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates, MappedHiddenStates
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.snapshots import Snapshots
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(0))


class _Stopped(Exception):
    pass


def _prune(
    family: str, snapshots: Snapshots | None = None, store: HiddenStateStore | None = None, stop_at: int | None = None
) -> tuple[dict[int, Tensors], torch.Tensor]:
    """The layers that this run wrote, and the logits that it ended with."""
    model = tiny_model(family, num_hidden_layers=6)
    anatomy = discover(model.config)
    dense = dense_decoder(model)
    neurons = {f"{index}.{anatomy.units[index][0].path}": torch.arange(0, 64) for index in range(6)}
    cut = Cut(6, (0, 1, 3, 5), {"intermediate_size": 64}, neurons)
    written: dict[int, Tensors] = {}

    def write(index: int, tensors: Tensors) -> None:
        if index == stop_at:
            raise _Stopped
        written[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    pruning = Pruning(
        dense, cut_decoder(dense, anatomy=anatomy, cut=cut), anatomy=anatomy, cut=cut, refit=Refit(), write=write
    )
    _, forward = pruning.run(WINDOWS, 2, snapshots=snapshots, store=store)
    return written, forward.logits(0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize(("stop_at", "share"), [(0, 1e9), (1, 1e9), (3, 1e9), (3, 1e-9)])
def test_continued_equals_uninterrupted(family: str, stop_at: int, share: float, tmp_path: Path) -> None:
    """After a stop only layers since the last kept state are done, and together they are those of one whole run.

    No time allowed for keeping states: only the first is kept.
    """
    whole, whole_logits = _prune(family)
    with pytest.raises(_Stopped):
        _prune(family, Snapshots(tmp_path, "same", share=share), stop_at=stop_at)
    rest, logits = _prune(family, Snapshots(tmp_path, "same", share=share))
    assert sorted(rest) == list(range(min(stop_at, 1) if share < 1 else stop_at, 4))
    assert torch.equal(logits, whole_logits)
    for index, tensors in rest.items():
        assert all(torch.equal(tensor, whole[index][name]) for name, tensor in tensors.items())


def test_state_of_another_run_is_not_used(tmp_path: Path) -> None:
    """Another fingerprint starts pass 2 over."""
    with pytest.raises(_Stopped):
        _prune("llama", Snapshots(tmp_path, "one"), stop_at=2)
    written, _ = _prune("llama", Snapshots(tmp_path, "another"))
    assert sorted(written) == [0, 1, 2, 3]


def test_state_of_another_version_is_not_used(tmp_path: Path) -> None:
    """Where what it keeps of a layer has other fields, everything is done again."""
    with pytest.raises(_Stopped):
        _prune("llama", Snapshots(tmp_path, "same", share=1e9), stop_at=2)
    progress = tmp_path / "progress.json"
    assert len(json.loads(progress.read_text())["records"]) > 0
    progress.write_text(progress.read_text().replace("mixer_held_out", "heads_held_out"))
    written, _ = _prune("llama", Snapshots(tmp_path, "same"))
    assert sorted(written) == list(range(len(written)))


def test_streams_on_file_equal_streams_in_memory(tmp_path: Path) -> None:
    """More hidden states than the limit go to a file, which leaves nothing behind and changes nothing."""
    store = HiddenStateStore(limit=0, folder=tmp_path)
    assert isinstance(store.allocate(torch.zeros(2, 3, 4), 5), MappedHiddenStates)
    assert type(HiddenStateStore(limit=10**6).allocate(torch.zeros(2, 3, 4), 5)) is HiddenStates
    in_memory, logits = _prune("llama")
    on_file, same_logits = _prune("llama", store=store)
    assert torch.equal(logits, same_logits)
    for index, tensors in in_memory.items():
        assert all(torch.equal(tensor, on_file[index][name]) for name, tensor in tensors.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cached_hidden_states_equal_a_second_pass(family: str, tmp_path: Path) -> None:
    """Pass 2 takes the dense hidden states of pass 1 wherever they are whole, and ends with the same weights."""
    model = tiny_model(family, num_hidden_layers=6)
    cache = HiddenStateCache(tmp_path, "key")
    store = HiddenStateStore(cache=cache)
    score(
        dense_decoder(model),
        discover(model.config),
        criteria=ScoringCriteria(depth=BlockInfluence()),
        calibration=CalibrationBatches(WINDOWS, 2, store),
    )
    assert len(list(tmp_path.iterdir())) == 6
    (tmp_path / "key-00003.safetensors").unlink()
    whole, whole_logits = _prune(family)
    written, logits = _prune(family, store=store)
    assert torch.equal(logits, whole_logits)
    for index, tensors in written.items():
        assert all(torch.equal(tensor, whole[index][name]) for name, tensor in tensors.items())


def test_cached_hidden_states_spare_the_dense_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a whole cache, dense layers run for the first kind of layer only."""
    model = tiny_model("llama", num_hidden_layers=6)
    cache = HiddenStateCache(tmp_path, "key")
    store = HiddenStateStore(cache=cache)
    score(
        dense_decoder(model),
        discover(model.config),
        criteria=ScoringCriteria(depth=BlockInfluence()),
        calibration=CalibrationBatches(WINDOWS, 2, store),
    )
    passed: list[int] = []
    walk_through = LayerwiseForward.pass_through
    monkeypatch.setattr(
        LayerwiseForward, "pass_through", lambda self, *args: (passed.append(args[0]), walk_through(self, *args))
    )
    _prune("llama", store=store)
    assert passed == [0]
