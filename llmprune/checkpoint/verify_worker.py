"""Script that ``verify`` runs in a fresh process, with plain transformers and no llmprune.

    python -P verify_worker.py CHECKPOINT PROBE.safetensors DEVICE yes|no AutoModelForCausalLM SPARSE.json

PROBE has ids [B, L], positions [P] and logits [B, P, V]. SPARSE has the names of sparse matrices, each with true if it
is stored [inputs, outputs], and the pattern: at most ``kept`` inputs of every group of ``of`` are not zero (null: no
groups). Prints one JSON object.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file


def counts(weight: torch.Tensor, transposed: bool, *, kept: int, of: int | None) -> list[int]:
    """Count zeros, groups, and groups with more weights than the pattern allows, of one matrix."""
    zeros = int((weight == 0).sum())
    if of is None:
        return [zeros, 0, 0]
    present = (weight.T if transposed else weight).ne(0).reshape(-1, of).sum(1)
    return [zeros, len(present), int((present > kept).sum())]


def generate(model: transformers.PreTrainedModel, ids_BL: torch.Tensor, *, use_cache: bool) -> list[list[int]]:
    """Generate eight greedy tokens, without the search or penalties of the model's own settings."""
    model.generation_config = transformers.GenerationConfig()
    greedy = transformers.GenerationConfig(
        max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1, use_cache=use_cache, pad_token_id=0
    )
    out_BL = model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=greedy)
    tokens: list[list[int]] = out_BL.tolist()
    return tokens


def main(  # noqa: PLR0917 - its arguments are those of the process
    checkpoint: str, probe_path: str, device: str, trust_remote_code: str, auto_class: str, sparse_path: str
) -> None:
    """Load the model, compare its logits, count zeros, generate; print the results."""
    with open(sparse_path, encoding="utf-8") as file:
        sparse = json.load(file)
    probe = load_file(probe_path)
    model, info = getattr(transformers, auto_class).from_pretrained(
        checkpoint,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=trust_remote_code == "yes",
        output_loading_info=True,
    )
    counted = [
        counts(model.get_submodule(name).weight.detach(), transposed, kept=sparse["kept"], of=sparse["of"])
        for name, transposed in sparse["matrices"]
    ]
    model = model.eval().to(device)
    with torch.inference_mode():
        ids_BL = probe["ids"].to(device)
        logits_BPV = model(input_ids=ids_BL, use_cache=False).logits[:, probe["positions"]].float().cpu()
        generations = [generate(model, ids_BL[:1, :16], use_cache=use_cache) for use_cache in (True, False)]
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {
        "keys": {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)},
        "difference": (logits_BPV - probe["logits"]).abs().max().item(),
        "scale": probe["logits"].abs().max().item(),
        "cached_generation_equal": generations[0] == generations[1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sparse": counted,
        "llmprune_imported": "llmprune" in sys.modules,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
