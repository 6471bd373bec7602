"""Hidden states of simulated GPUs: equal to the CPU's, copied in order, without waits for every batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.devices import CopyKind, SimulatedDevices, simulated_devices
from torch import Tensor

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.common.errors import NumericalError
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates, MappedHiddenStates, PinnedHiddenStates
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.recipe.model import ModelSource
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(0))
ENDS = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
ONE_GPU = {"": 0}
TWO_GPUS = ENDS | {f"model.layers.{layer}": layer % 2 for layer in range(4)}
GPU, OTHER_GPU = torch.device("cuda", 0), torch.device("cuda", 1)
STORES: dict[str, Callable[[], HiddenStateStore]] = {  # made for each simulation: a store has streams of its devices
    "host": HiddenStateStore,
    "device": lambda: HiddenStateStore(device_bytes=1 << 30),
    "one buffer on the device": lambda: HiddenStateStore(device_bytes=12 * 8 * 32 * 4),
    "file": lambda: HiddenStateStore(limit=0),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


def _decoder(folder: Path, device_map: object) -> Decoder:
    return open_decoder(ModelSource.model_validate({"id": str(folder), "device_map": device_map}))


def _everything(decoder: Decoder, store: HiddenStateStore) -> list[Tensor]:
    """Hidden states after every layer and copies of them, then after a second pass from the start, and logits."""
    forward = LayerwiseForward(decoder, IDS, batch_size=2, store=store)
    copies: list[HiddenStates] = []
    for index in range(len(decoder)):
        copies += [forward.copy(), forward.copy(slice(-1, None))]
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    logits = forward.logits(1)
    forward.restart()
    with decoder.layer(0) as layer:
        again = [output_BLD for *_, output_BLD in forward.outputs(0, layer)]
    return [
        one.cpu() for one in (*[batch for copy in copies for batch in copy], *forward.hidden_states, *again, logits)
    ]


@pytest.mark.parametrize("make_store", STORES.values(), ids=STORES.keys())
@pytest.mark.parametrize("device_map", [ONE_GPU, TWO_GPUS], ids=["one GPU", "two GPUs"])
def test_hidden_states_equal_those_of_the_cpu(
    device_map: object, make_store: Callable[[], HiddenStateStore], llama: Path
) -> None:
    """On the device, in pinned memory and in files, also where layers alternate between GPUs."""
    on_cpu = _everything(_decoder(llama, "cpu"), HiddenStateStore())
    with simulated_devices(2):
        found = _everything(_decoder(llama, device_map), make_store())
    assert len(found) == len(on_cpu)
    assert all(map(torch.equal, found, on_cpu))


def _pass_layers(decoder: Decoder, batches: int, *, store: HiddenStateStore, devices: SimulatedDevices) -> None:
    """Run all layers, with counts from the first layer on."""
    forward = LayerwiseForward(decoder, IDS[: 2 * batches], batch_size=2, store=store)
    decoder.drop_held_and_next()  # the next layer may have been copied in part
    devices.waits.clear()
    devices.copies.clear()
    devices.pins.clear()
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)


@pytest.mark.parametrize("name", ["host", "device"])
def test_the_host_does_not_wait_for_every_batch(name: str, llama: Path) -> None:
    """Twice the batches make the host wait no more often: once a layer for its check, besides the layer's reading."""
    waits = []
    for batches in (3, 6):
        with simulated_devices(1) as devices:
            _pass_layers(_decoder(llama, ONE_GPU), batches, store=STORES[name](), devices=devices)
            waits.append(dict(devices.waits))
            assert all(kind in (CopyKind.TO_DEVICE, CopyKind.TO_HOST) for kind, _ in devices.copies)
    assert waits[0] == waits[1]
    assert sum(count for line, count in waits[0].items() if "finite_outputs" in line) == 4


def test_pinned_memory_is_made_once(llama: Path) -> None:
    """No layer pins memory for hidden states that earlier layers had pinned."""
    with simulated_devices(1) as devices:
        decoder = dense_decoder(tiny_model("llama").to("cuda:0"))
        _pass_layers(decoder, 6, store=HiddenStateStore(), devices=devices)
        assert not devices.pins


def test_resident_hidden_states_are_not_copied() -> None:
    """Hidden states within the budget cross no bus."""
    with simulated_devices(1) as devices:
        decoder = dense_decoder(tiny_model("llama").to("cuda:0"))
        _pass_layers(decoder, 6, store=STORES["device"](), devices=devices)
        assert not devices.copies


def test_device_bytes_are_a_budget_of_live_buffers(tmp_path: Path) -> None:
    """Buffers stay on the device while they fit together; a freed one makes room."""
    with simulated_devices(1):
        first_BLD = torch.zeros(2, 3, 4, device="cuda:0")
        store = HiddenStateStore(limit=200, folder=tmp_path, device_bytes=300)
        resident = store.allocate(first_BLD, 4)  # 192 bytes
        assert not isinstance(resident, PinnedHiddenStates | MappedHiddenStates)
        assert isinstance(store.allocate(first_BLD, 4), PinnedHiddenStates)
        assert isinstance(store.allocate(first_BLD, 8), MappedHiddenStates)
        del resident
        assert not isinstance(store.allocate(first_BLD, 4), PinnedHiddenStates)
        assert type(store.allocate(first_BLD.cpu(), 4)) is HiddenStates  # of the CPU


@pytest.mark.parametrize("make_store", STORES.values(), ids=STORES.keys())
def test_a_batch_that_is_replaced_is_not_read_ahead(make_store: Callable[[], HiddenStateStore]) -> None:
    """A batch replaced after the one before it was read, in order, is read as replaced; on another GPU too."""
    with simulated_devices(2):
        values = [torch.full((2, 3, 4), float(number), device=GPU) for number in range(5)]
        kept = make_store().allocate(values[0], 8)
        for value in values[:4]:
            kept.append(value)
        assert kept.at(0, GPU).sum() == 0
        kept[1] = values[4]
        assert kept.at(1, GPU).sum() == 4 * 24
        kept[2] = values[4].to(OTHER_GPU) * 2
        assert kept.at(2, OTHER_GPU).sum() == 8 * 24
        assert kept.at(3, OTHER_GPU).sum() == 3 * 24
        assert [float(value.sum()) / 24 for value in kept] == [0, 4, 8, 3]


@pytest.mark.parametrize("make_store", STORES.values(), ids=STORES.keys())
def test_saved_hidden_states_are_loaded(make_store: Callable[[], HiddenStateStore], tmp_path: Path) -> None:
    """Batches on their way to the host are saved whole; loaded ones replace them, and are then read on the device."""
    with simulated_devices(1):
        values = [torch.full((2, 3, 4), float(number), device=GPU) for number in range(4)]
        kept = make_store().allocate(values[0], 8)
        for value in values:
            kept.append(value)
        kept.save(tmp_path / "kept")
        for batch in range(4):
            kept[batch] = kept.at(batch, GPU) + 10
        kept.load(tmp_path / "kept")
        assert [float(kept.at(batch, GPU).sum()) / 24 for batch in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_an_output_that_is_not_finite_is_named(device: str) -> None:
    """The first batch with NaN, and the layer, are named after all batches and one wait of the host."""
    with simulated_devices(1) if device != "cpu" else nullcontext() as devices:
        decoder = dense_decoder(tiny_model("llama").to(device))
        forward = LayerwiseForward(decoder, IDS, batch_size=2)
        forward.hidden_states[3] = torch.full((2, 8, 32), torch.nan, device=device)
        forward.hidden_states[4] = torch.full((2, 8, 32), torch.inf, device=device)
        with decoder.layer(1) as layer, pytest.raises(NumericalError, match=r"layer 1 .* calibration batch 3"):
            forward.pass_through(1, layer)
        if devices is not None:
            assert sum(count for line, count in devices.waits.items() if "finite_outputs" in line) == 1


def test_large_finite_outputs_are_finite() -> None:
    """Values whose sum overflows are no error."""
    decoder = dense_decoder(tiny_model("llama"))
    forward = LayerwiseForward(decoder, IDS, batch_size=2)
    forward.hidden_states[1] = torch.full((2, 8, 32), 3e38)
    with decoder.layer(1) as layer:
        forward.pass_through(1, layer)
    assert forward.hidden_states[1].isfinite().all()
