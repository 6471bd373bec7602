"""Plain transformers loads every tensor, and computes finite logits."""

from __future__ import annotations

from llmprune.evaluation.next_tools.base import Subject, ToolCheck, ToolFailure, logits


def work(subject: Subject) -> str:
    """Load the model with its loading information, and run it."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, info = AutoModelForCausalLM.from_pretrained(
        subject.folder, dtype="auto", use_safetensors=True, device_map={"": device}, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise ToolFailure(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, info[kind]))[:3])}")
    logits(model.eval(), subject.ids())
    return f"{sum(one.numel() for one in model.parameters()):,} parameters, no key missing or unexpected"


CHECK = ToolCheck("transformers: plain reload", work)
