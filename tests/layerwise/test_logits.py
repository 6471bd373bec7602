"""Logits in chunks of tokens: the same values as those of whole batches, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.devices import simulated_devices
from helpers.families import DISTINCT
from helpers.scored import scores_of

from llmprune.criteria.width.taylor import Taylor
from llmprune.layerwise import logits
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.layer_calls import takes_positions
from llmprune.layerwise.logits import token_chunks
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


def _completed(model: Any, batch_size: int = 5) -> LayerwiseForward:
    decoder = dense_decoder(model)
    forward = LayerwiseForward(decoder, IDS, batch_size=batch_size)
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    return forward


@pytest.mark.parametrize("family", DISTINCT)
def test_chunks_make_up_the_logits_of_the_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole windows, or positions of one window: every family's logits are those of the whole batch."""
    forward = _completed(tiny_model(family))
    whole_BLV = forward.logits(0)
    for tokens, chunks in ((60, 1), (30, 3), (5, 15 if takes_positions(forward.decoder.skeleton) else 5)):
        monkeypatch.setattr(logits, "MAX_LOGITS", tokens * forward.decoder.skeleton.config.get_text_config().vocab_size)
        found_BLV, number = torch.zeros_like(whole_BLV), 0
        with torch.no_grad():
            for chunk in token_chunks(forward, IDS):
                logits_BPV = chunk.logits(forward, IDS, hidden_BLD=forward.hidden_states[0])
                found_BLV[chunk.windows, chunk.positions] = logits_BPV
                number += 1
        assert number == chunks
        if chunks == 1:
            assert torch.equal(found_BLV, whole_BLV)
        torch.testing.assert_close(found_BLV, whole_BLV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_positions_without_a_target_have_no_logits(family: str) -> None:
    """Chunks begin with the first position that predicts a target that counts; their logits are those of the batch."""
    decoder = dense_decoder(tiny_model(family))
    forward = LayerwiseForward(decoder, IDS, batch_size=5, first_target=7)
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    whole_BLV = forward.logits(0)
    with torch.no_grad():
        for chunk in token_chunks(forward, IDS):
            assert chunk.positions.start == 6
            found_BPV = chunk.next_token_logits(forward, IDS, hidden_BLD=forward.hidden_states[0])
            torch.testing.assert_close(found_BPV, whole_BLV[chunk.windows, 6:-1], rtol=1e-5, atol=1e-5)


def test_a_model_without_positions_is_run_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward without ``logits_to_keep`` gives the logits of one window at a time."""
    model = tiny_model("llama")

    class OwnForward(type(model)):  # type: ignore[misc]
        """Llama with the forward that a repository's own code may have."""

        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    forward = _completed(model)
    forward.decoder.skeleton.__class__ = OwnForward
    monkeypatch.setattr(logits, "MAX_LOGITS", VOCABULARY)
    with torch.no_grad():
        logits_of = [
            chunk.logits(forward, IDS, hidden_BLD=forward.hidden_states[0]) for chunk in token_chunks(forward, IDS)
        ]
    assert [logits_1LV.shape for logits_1LV in logits_of] == [(1, 12, VOCABULARY)] * 5


def test_chunks_copy_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positions of each chunk are made where the logits are computed."""
    with simulated_devices(1) as devices:
        forward = _completed(tiny_model("llama").to("cuda:0"))
        ids_BL, hidden_BLD = forward.token_ids(0), forward.hidden_states.at(0, forward.decoder.device)
        monkeypatch.setattr(logits, "MAX_LOGITS", 5 * VOCABULARY)
        devices.copies.clear()
        chunks = list(token_chunks(forward, ids_BL))
        with torch.no_grad():
            assert all(chunk.logits(forward, ids_BL, hidden_BLD=hidden_BLD).is_cuda for chunk in chunks)
        assert len(chunks) == 15
        assert not devices.copies


def test_gradients_in_chunks_are_those_of_the_whole_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a window is a sum over its tokens, so scores by gradients do not depend on the chunks."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "chunks").mkdir()
    whole = scores_of(tiny_model("llama"), Taylor(absolute="all"), tmp_path / "whole")
    monkeypatch.setattr(logits, "MAX_LOGITS", 5 * VOCABULARY)
    chunks = scores_of(tiny_model("llama"), Taylor(absolute="all"), tmp_path / "chunks")
    for key, score_F in whole.items():
        torch.testing.assert_close(chunks[key], score_F, rtol=1e-5, atol=1e-8)
