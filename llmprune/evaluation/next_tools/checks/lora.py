"""peft trains an adapter of low rank for ten steps, merges it, and plain transformers reloads the result."""

from __future__ import annotations

from typing import Any

from llmprune.evaluation.next_tools.base import Subject, ToolCheck, ToolFailure, divergence, logits

_STEPS, _RATE, _RANK = 10, 1e-3, 8


def work(subject: Subject) -> str:
    """Train on one text, whose loss must fall; merge, save and reload."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ids_BL = subject.ids()
    settings = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(subject.model(), settings).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=_RATE)
    losses, given = [], ids_BL.to(model.device)
    for _ in range(_STEPS):
        loss = model(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise ToolFailure(f"the loss does not fall in {_STEPS} steps: {losses[0]:.4g} → {losses[-1]:.4g}")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(subject.scratch / "merged")
    again = AutoModelForCausalLM.from_pretrained(subject.scratch / "merged", dtype="auto").eval()
    told = divergence(logits(merged, ids_BL), logits(again, ids_BL), most=1e-3, tool="the merged model, reloaded,")
    change = f"loss {losses[0]:.3g} → {losses[-1]:.3g} in {_STEPS} steps"
    return f"{change}; merged and reloaded ({told.partition(' to')[0]})"


CHECK = ToolCheck("peft: LoRA, merge", work, modules=("peft",), install="pip install peft")
