"""All checks of next tools, in the order of the table."""

from __future__ import annotations

from llmprune.evaluation.next_tools.base import ToolCheck
from llmprune.evaluation.next_tools.checks import (
    cached_generation,
    exported_graph,
    llama_cpp,
    llm_compressor,
    lm_eval_command,
    lora,
    plain_reload,
    quantised,
    vllm,
)

_ALL = (
    plain_reload.CHECK,
    cached_generation.CHECK,
    llama_cpp.CHECK,
    vllm.CHECK,
    lora.CHECK,
    quantised.BITSANDBYTES,
    quantised.TORCHAO,
    llm_compressor.CHECK,
    exported_graph.EXPORT,
    exported_graph.ONNX,
    lm_eval_command.CHECK,
)
CHECKS: dict[str, ToolCheck] = {check.name: check for check in _ALL}
