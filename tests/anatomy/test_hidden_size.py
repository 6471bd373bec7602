"""Residual channels: found by the sizes of tensors, proven on a small model, refused with a reason elsewhere."""

from __future__ import annotations

import pytest

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hidden_size import find_hidden_size
from llmprune.anatomy.types import HiddenSize
from llmprune.testing import tiny_config


def _hidden(family: str) -> HiddenSize:
    config = tiny_config(family)
    return find_hidden_size(config, discover(config))


@pytest.mark.parametrize(
    ("family", "has_head", "has_offset"),
    [("llama", True, False), ("gemma3_text", False, True), ("mixtral", True, False)],
)
def test_every_tensor_has_its_role(family: str, has_head: bool, has_offset: bool) -> None:
    """Tied heads are no tensors of their own; Gemma's norms multiply by one plus their weight."""
    found = _hidden(family)
    assert found.refusal is None
    assert found.size == 32
    assert [one.role for one in found.outside] == ["writes", "scales"] + ["reads"] * has_head
    roles = {one.name: one.role for one in found.layers[0]}
    assert roles["self_attn.q_proj.weight"] == "reads"
    assert roles["self_attn.o_proj.weight"] == "writes"
    assert {one.has_offset for one in found.layers[0] if one.role == "scales"} == {has_offset}
    if family == "mixtral":
        assert roles["mlp.experts.gate_up_proj"] == roles["mlp.gate.weight"] == "reads"
        assert roles["mlp.experts.down_proj"] == "writes"


def test_a_config_that_derives_heads_from_the_hidden_size_is_refused() -> None:
    """The reason names the tensor and its sizes."""
    found = _hidden("gpt_neox")
    assert "query_key_value.weight is not one size per channel" in (found.refusal or "")


def test_a_config_limits_the_sizes() -> None:
    """Llama's config accepts multiples of the number of heads."""
    assert _hidden("llama").possible == (4, 8, 12, 16, 20, 24, 28)
