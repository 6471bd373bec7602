"""Copies of layers, hidden states and arguments to simulated GPUs: what arrives is whole, and buffers are reused."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.devices import CopyKind, simulated_devices
from torch import Tensor

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.checkpoint.placement import device_map_of_whole
from llmprune.layerwise.decoder import Decoder, LayerPlacement
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.transfer import ARRIVING, LEAVING, CopyStream, LayerCopies, Staging
from llmprune.recipe.model import ModelSource
from llmprune.testing import VOCABULARY, tiny_model

GPU = torch.device("cuda", 0)
IDS = torch.randint(3, VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(0))


def _layer(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(31, 17, generator=generator)
    return {
        "matrix": matrix,
        "transposed": matrix.T,
        "half": matrix[:7].bfloat16(),
        "scalar": torch.tensor(float(seed)),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(300, dtype=torch.uint8) + seed,
    }


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_layers_arrive_whole(chunk: int) -> None:
    """In chunks or at once, of any shape and type, through pinned buffers that later layers use again."""
    with simulated_devices(1) as devices:
        copies, pins = LayerCopies(GPU, chunk=chunk), []
        for seed in range(3):
            arriving = copies.bring(_layer(seed), after=torch.cuda.current_stream(GPU).record_event())
            found = {name: tensor + 0 for name, tensor in arriving.on_compute_stream(GPU).items()}
            assert all(tensor.device == GPU for tensor in found.values())
            assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in _layer(seed).items())
            pins.append(sum(devices.pins.values()))
        assert pins[0] == pins[2]
        assert {kind for kind, line in devices.copies if line.startswith("layerwise/")} == {CopyKind.TO_DEVICE}


def test_a_layer_in_use_keeps_its_memory() -> None:
    """The copy stream does not get the memory of a layer that was dropped while the compute stream may still use it."""
    with simulated_devices(1):
        copies = LayerCopies(GPU)
        used = copies.bring(_layer(0), after=None).on_compute_stream(GPU)["matrix"] + 1
        copies.bring(_layer(1), after=None)  # the simulation raises without record_stream
        assert torch.equal(used.cpu(), _layer(0)["matrix"] + 1)


def test_layers_of_a_run_are_copied_from_pinned_memory(tmp_path: Path) -> None:
    """Layers in files reach the GPU from pinned memory only, and more batches copy them no more often."""
    tiny_model("llama").save_pretrained(tmp_path)
    counts = []
    for windows in (4, 12):
        with simulated_devices(1) as devices:
            decoder = open_decoder(ModelSource(id=str(tmp_path), device_map="cpu"))
            forward = LayerwiseForward(decoder, IDS[:windows], batch_size=2)
            decoder.drop_held_and_next()
            devices.copies.clear()
            for index in range(len(decoder)):
                with decoder.layer(index) as layer:
                    forward.pass_through(index, layer)
            assert forward.hidden_states.device == GPU
            counts.append(Counter(devices.copies))
    assert {kind for kind, _ in counts[1]} == {CopyKind.TO_DEVICE, CopyKind.TO_HOST}
    grown = {kind for kind, _ in counts[1] - counts[0]}
    assert grown == {CopyKind.TO_DEVICE, CopyKind.TO_HOST}  # hidden states
    layers = [sum(count for key, count in each.items() if key not in counts[1] - counts[0]) for each in counts]
    assert layers[0] == layers[1] == 4 * 9  # four projections of attention, three of the MLP, two norms


def test_shared_arguments_are_copied_to_a_device_once(tmp_path: Path) -> None:
    """Masks and rotary embeddings reach the GPU of some layers once, not with every batch and layer."""
    tiny_model("gemma2").save_pretrained(tmp_path)
    ends = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    device_map = ends | {f"model.layers.{layer}": layer % 2 for layer in range(4)}
    copied = []
    for windows in (4, 12):
        with simulated_devices(2) as devices:
            source = ModelSource.model_validate({"id": str(tmp_path), "device_map": device_map})
            decoder = open_decoder(source)
            forward = LayerwiseForward(decoder, IDS[:windows], batch_size=2)
            for index in range(len(decoder)):
                with decoder.layer(index) as layer:
                    forward.pass_through(index, layer)
            copied.append(sum(count for (_, line), count in devices.copies.items() if "layer_calls" in line))
    assert copied[0] == copied[1] > 0


def test_calls_are_compared_once_a_batch() -> None:
    """Recording the arguments of twice the layers makes the host wait no more often."""
    waits = []
    for layers in (2, 4):
        with simulated_devices(1) as devices:
            LayerwiseForward(dense_decoder(tiny_model("llama", num_hidden_layers=layers).to(GPU)), IDS, batch_size=2)
            waits.append(sum(count for line, count in devices.waits.items() if "shared_values" in line))
    assert waits[0] == waits[1] > 0


def test_what_leaves_or_arrives_is_bounded() -> None:
    """A device holds few tensors on their way to the host, however many were sent, and few that nobody asked for."""
    with simulated_devices(1) as devices:
        stream = CopyStream(GPU)
        pinned = torch.zeros(10, 256, pin_memory=True)
        for row in pinned:
            stream.send(torch.ones(256, device=GPU), row)
        assert devices.used["cuda:0"] == LEAVING * 1024
        arriving = []
        while stream.may_bring_ahead:
            arriving.append(stream.bring(pinned[0]))
        assert len(arriving) == ARRIVING
        arriving.pop().tensor()
        assert stream.may_bring_ahead


def test_a_tensor_that_nobody_takes_does_not_free_memory_in_use() -> None:
    """The compute stream waits for the copy before it allocates the memory of a tensor that was not used."""
    with simulated_devices(1):
        stream = CopyStream(GPU)
        stream.bring(torch.ones(256, pin_memory=True))
        assert torch.zeros(256, device=GPU).sum() == 0  # the simulation raises if the memory may still be written


def test_pageable_memory_gets_what_was_sent() -> None:
    """Copies through the pinned buffers end in their targets in order, the last ones when asked for."""
    with simulated_devices(1) as devices:
        stream = CopyStream(GPU)
        targets = [torch.zeros(4) for _ in range(5)]
        for number, target in enumerate(targets):
            stream.send_pageable(torch.full((4,), float(number), device=GPU), target)
        assert [float(target[0]) for target in targets] == [0, 1, 2, 0, 0]
        stream.settle(targets[4])
        assert [float(target[0]) for target in targets] == [0, 1, 2, 0, 4]
        stream.settle(targets[3])
        assert float(targets[3][0]) == 3
        assert sum(devices.pins.values()) == 2


def test_a_buffer_grows_for_a_larger_tensor_only() -> None:
    """Two buffers serve tensors of falling size."""
    with simulated_devices(1) as devices:
        staging = Staging()
        for size in (8, 8, 4, 2, 8):
            assert staging.take().like(torch.zeros(size, 3)).shape == (size, 3)
        assert sum(devices.pins.values()) == 2
        staging.take().like(torch.zeros(9, 3))
        assert sum(devices.pins.values()) == 3


def test_the_wait_for_layers_is_measured() -> None:
    """A decoder adds up the time in which layers were brought from the disk and nothing else was done."""
    decoder = dense_decoder(tiny_model("llama"))
    slow = Decoder(
        decoder.skeleton, decoder.tensors, placement=decoder.placement, prefetch=lambda index: time.sleep(0.05)
    )
    slow.tensors(0)
    waited = slow.waits.seconds
    assert waited > 0.02
    slow.tensors(0)
    assert slow.waits.seconds == waited


def test_a_process_of_several_leaves_the_other_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its placement nor its copies make a context on a GPU of another process."""
    tiny_model("llama").save_pretrained(tmp_path)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for device_map in ("auto", "cpu"):
        source = ModelSource(id=str(tmp_path), device_map=device_map)
        with simulated_devices(2) as devices:
            decoder = open_decoder(source)
            device_map_of_whole(source, decoder.skeleton)
            forward = LayerwiseForward(decoder, IDS, batch_size=2)
            for index in range(len(decoder)):
                with decoder.layer(index) as layer:
                    forward.pass_through(index, layer)
            assert forward.logits(0).device == torch.device("cuda", 1)
        assert devices.contexts == {1}


def test_a_decoder_that_saves_memory_copies_no_layer_ahead() -> None:
    """Else the next layer is on its way to the GPU while one computes."""
    fetched: list[int] = []
    dense = dense_decoder(tiny_model("llama"))

    def fetch(index: int) -> dict[str, Tensor]:
        fetched.append(index)
        return dense.tensors(index)

    with simulated_devices(1):
        gpu = LayerPlacement((torch.device("cuda:0"),) * len(dense))
        decoder = Decoder(dense.skeleton, fetch, placement=gpu, prefetch=lambda index: None)
        decoder.tensors(0)
        decoder.save_memory()
        assert fetched == [0, 1]
        decoder.tensors(1)
        decoder.drop_held_and_next()
    assert fetched == [0, 1, 1]
