"""llm-compressor rounds the weights to 4 bits in groups, and plain transformers reloads the result."""

from __future__ import annotations

from llmprune.evaluation.next_tools.base import NotChecked, Subject, ToolCheck, logits

_GROUPS = (128, 64, 32)  # inputs of a matrix that share a scale; the first is what vLLM's kernels take everywhere
_HEAD = "lm_head"


def work(subject: Subject) -> str:
    """Quantise without calibration text, save, reload and compute."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = subject.model()
    inputs = {
        module.in_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != _HEAD
    }
    group = next((group for group in _GROUPS if not any(number % group for number in inputs)), None)
    if not inputs or group is None:
        raise NotChecked(
            "no group of 32 or more divides the inputs of every linear layer" if inputs else "no linear layer"
        )
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=[_HEAD])
    target = subject.scratch / "compressed"
    oneshot(model=model, recipe=recipe).save_pretrained(target, save_compressed=True)
    logits(AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval(), subject.ids())
    return f"W4A16 in groups of {group}, saved and reloaded"


CHECK = ToolCheck(
    "llm-compressor: W4A16", work, modules=("llmcompressor", "compressed_tensors"), install="pip install llmcompressor"
)
