"""vLLM continues a text as transformers does."""

from __future__ import annotations

from llmprune.evaluation.next_tools.base import Subject, ToolCheck, ToolFailure

_TOKENS = 16


def work(subject: Subject) -> str:
    """Generate greedily with both, and compare the first token: later ones depend on how each rounds."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    ids_BL, model = subject.ids(), subject.model()
    given = ids_BL.to(model.device)
    made_BL = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=_TOKENS, do_sample=False, pad_token_id=0
    )
    wanted = made_BL[0, ids_BL.shape[1] :].tolist()
    del model
    engine = LLM(str(subject.folder), enforce_eager=True, max_model_len=len(ids_BL[0]) + _TOKENS + 8)
    greedy = SamplingParams(temperature=0.0, max_tokens=_TOKENS)
    found = engine.generate(TokensPrompt(prompt_token_ids=ids_BL[0].tolist()), greedy)[0].outputs[0].token_ids
    pairs = enumerate(zip(wanted, found, strict=False))
    same = next((place for place, (one, other) in pairs if one != other), len(found))
    if not same:
        raise ToolFailure(f"the first greedy token is {found[0]}, and with transformers {wanted[0]}")
    return f"{same} of {_TOKENS} greedy tokens as with transformers"


CHECK = ToolCheck("vLLM", work, modules=("vllm",), install="pip install vllm")
