"""transformers quantises the linear layers to 8 bits as it loads them."""

from __future__ import annotations

from llmprune.evaluation.next_tools.base import Subject, ToolCheck, divergence, logits

_MOST = 0.1  # nats; 8-bit weights of a sound model lose hundredths at most


def bitsandbytes(subject: Subject) -> str:
    """Load in 8 bits with bitsandbytes."""
    from transformers import BitsAndBytesConfig

    return _compared(subject, BitsAndBytesConfig(load_in_8bit=True), tool="bitsandbytes")


def torchao(subject: Subject) -> str:
    """Load with 8-bit weights of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return _compared(subject, TorchAoConfig(Int8WeightOnlyConfig()), tool="torchao")


def _compared(subject: Subject, settings: object, *, tool: str) -> str:
    ids_BL = subject.ids()
    plain_BLV = logits(subject.model(), ids_BL)
    found_BLV = logits(subject.model(quantization_config=settings), ids_BL)
    return divergence(plain_BLV, found_BLV, most=_MOST, tool=tool)


BITSANDBYTES = ToolCheck("bitsandbytes: int8", bitsandbytes, ("bitsandbytes",), "pip install bitsandbytes")
TORCHAO = ToolCheck("torchao: int8", torchao, ("torchao",), "pip install torchao")
