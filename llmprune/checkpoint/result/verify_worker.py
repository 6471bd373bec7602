"""Script that ``verify`` runs in a fresh process, with plain transformers and no llmprune.

    python -P verify_worker.py JOB.json

JOB names the ``checkpoint``, its ``auto_class`` and ``trust_remote_code``; the ``device_map`` of its modules (null: all
on the CPU) and the ``offload_folder`` for what is left on disk in another form than in the files; the ``probe``, a
safetensors file with ids [B, L], positions [P], logits [B, P, V] and the model's other inputs; and the sparse
``matrices``, each with true if it is stored [inputs, outputs], with their ``pattern``: at most the first number of
every group of the second number of inputs are not zero (null: no groups); and the ``tolerance`` of logits, relative to
the largest. Prints one JSON object.
"""

import json
import sys
from inspect import signature

import torch
import transformers
from accelerate.utils import align_module_device
from safetensors.torch import load_file


def counts(model: torch.nn.Module, name: str, *, transposed: bool, pattern: list[int] | None) -> list[int]:
    """Count zeros, groups, and groups with more weights than the pattern allows, of one matrix or stack of matrices.

    ``name``: of a module with a weight, or of the stack itself.
    """
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    is_stack = isinstance(getattr(module, last), torch.nn.Parameter)
    module, own = (module, last) if is_stack else (getattr(module, last), "weight")
    with align_module_device(module):  # reads an offloaded weight from the files
        weight = module.get_parameter(own)
        zeros = int((weight == 0).sum())
        if pattern is None:
            return [zeros, 0, 0]
        kept, of = pattern
        present = (weight.mT if transposed else weight).ne(0).reshape(-1, of).sum(1)
        return [zeros, len(present), int((present > kept).sum())]


def logits_at(
    model: torch.nn.Module, ids_BL: torch.Tensor, *, positions_P: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the logits [B, P, V] at some positions, of which the model computes no others where it can."""
    if "logits_to_keep" in signature(type(model).forward).parameters:
        # a list: a tensor would be moved to the first GPU, and hidden states on the last one take no indices from there
        kept = positions_P.tolist()
        logits_BPV: torch.Tensor = model(input_ids=ids_BL, **inputs, use_cache=False, logits_to_keep=kept).logits
    else:
        logits_BPV = model(input_ids=ids_BL, **inputs, use_cache=False).logits[:, positions_P]
    return logits_BPV.float().cpu()


def logits_in_batches(
    model: torch.nn.Module, ids_BL: torch.Tensor, *, positions_P: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the same for all windows at once; for half as many where a device runs out of memory.

    ``inputs``: the model's other arguments, of a single window.
    """
    size = len(ids_BL)
    while True:
        try:
            parts = torch.split(ids_BL, size)
            return torch.cat([logits_at(model, part, positions_P=positions_P, inputs=inputs) for part in parts])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2  # the traceback, which holds the tensors of the failed attempt, is gone
        torch.cuda.empty_cache()


def generate(model: transformers.PreTrainedModel, ids_BL: torch.Tensor, *, use_cache: bool) -> list[list[int]]:
    """Generate eight greedy tokens, without the search or penalties of the model's own settings."""
    model.generation_config = transformers.GenerationConfig()
    greedy = transformers.GenerationConfig(
        max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1, use_cache=use_cache, pad_token_id=0
    )
    out_BL = model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=greedy)
    tokens: list[list[int]] = out_BL.tolist()
    return tokens


def same_up_to_rounding(
    model: transformers.PreTrainedModel, generations: list[list[list[int]]], *, tolerance: float
) -> bool:
    """Check that two generations agree, or first differ in tokens whose logits do not.

    With the cache other kernels compute a token, and round differently. ``tolerance``: of the two logits, relative to
    the largest.
    """
    (first,), (second,) = generations
    differing = next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=True)) if one != other), None
    )
    if differing is None:
        return True
    before_1L = torch.tensor([first[:differing]], device=input_device(model))
    logits_V = model(input_ids=before_1L, use_cache=False).logits[0, -1].float()
    apart = (logits_V[first[differing]] - logits_V[second[differing]]).abs().item()
    return bool(apart <= tolerance * max(logits_V.abs().max().item(), 1.0))


def input_device(model: transformers.PreTrainedModel) -> torch.device:
    """Return the device of a model's inputs: the CPU where a part is offloaded."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def main(job_path: str) -> None:
    """Load the model, compare its logits, count zeros, generate; print the results."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    probe = load_file(job["probe"])
    model, info = getattr(transformers, job["auto_class"]).from_pretrained(
        job["checkpoint"],
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=job["trust_remote_code"],
        output_loading_info=True,
        device_map=job["device_map"],
        offload_folder=job["offload_folder"],
    )
    model = model.eval()
    device = input_device(model)
    ids_BL = probe["ids"].to(device)
    inputs = {
        name.removeprefix("inputs."): value.to(device, model.dtype if value.is_floating_point() else None)
        for name, value in probe.items()
        if name.startswith("inputs.")
    }
    with torch.inference_mode():
        logits_BPV = logits_in_batches(model, ids_BL, positions_P=probe["positions"], inputs=inputs)
        generations = [generate(model, ids_BL[:1, :16], use_cache=use_cache) for use_cache in (True, False)]
        same = same_up_to_rounding(model, generations, tolerance=job["tolerance"])
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {
        "keys": {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)},
        "difference": (logits_BPV - probe["logits"]).abs().max().item(),
        "scale": probe["logits"].abs().max().item(),
        "cached_generation_equal": same,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sparse": [
            counts(model, name, transposed=transposed, pattern=job["pattern"]) for name, transposed in job["matrices"]
        ],
        "llmprune_imported": "llmprune" in sys.modules,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
