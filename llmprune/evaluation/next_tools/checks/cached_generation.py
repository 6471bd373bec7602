"""Greedy generation with the key-value cache equals that without."""

from __future__ import annotations

from llmprune.common.linalg.precision import dtype_name
from llmprune.evaluation.next_tools.base import Subject, ToolCheck, ToolFailure, logits

_TOKENS = 16
_ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of two logits, relative to the largest


def work(subject: Subject) -> str:
    """Generate twice, and compare."""
    import torch
    from transformers import GenerationConfig

    model, ids_BL = subject.model(), subject.ids()
    model.generation_config, found = GenerationConfig(), []
    for use_cache in (True, False):
        greedy = GenerationConfig(
            max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        given = ids_BL.to(model.device)
        made_BL = model.generate(given, attention_mask=torch.ones_like(given), generation_config=greedy)
        found.append(made_BL[0, ids_BL.shape[1] :].tolist())
    first, second = found
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other:  # other kernels compute a token with the cache, and round differently
            before_BL = torch.cat([ids_BL[0], torch.tensor(first[:place], dtype=torch.long)])[None]
            logits_V = logits(model, before_BL)[0, -1]
            limit = _ROUNDING.get(dtype_name(model.dtype), 1e-4) * float(logits_V.abs().max())
            if abs(float(logits_V[one] - logits_V[other])) > limit:
                raise ToolFailure(f"token {place + 1} differs between generation with the cache and without")
            return f"{place} greedy tokens equal, then two that rounding decides between"
    return f"{_TOKENS} greedy tokens equal"


CHECK = ToolCheck("transformers: cached generation", work)
