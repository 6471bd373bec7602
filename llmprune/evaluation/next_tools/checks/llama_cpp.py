"""llama.cpp: converter, the same tokens and logits as transformers, quantiser.

Shapes in names: L tokens, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.checkpoint.llama_cpp.tools import LlamaCpp, remedy
from llmprune.checkpoint.llama_cpp.write_gguf import GgufWriter, names_code, run_tool
from llmprune.evaluation.next_tools.base import TEXT, NotChecked, Subject, ToolCheck, ToolFailure, divergence, logits

if TYPE_CHECKING:
    from torch import Tensor

_MOST, _MOST_Q8 = 0.02, 0.1  # nats: of a file as wide as the checkpoint, and of Q8_0
_TOKENS = 12


def missing() -> str | None:
    """Return how to install the converter; None where it is there."""
    return None if LlamaCpp.find().converter else remedy()


def work(subject: Subject) -> str:
    """Convert, compute, quantise, compute again."""
    if names_code(subject.folder):
        raise NotChecked("the checkpoint names Python code of its own, which llama.cpp's converter would run")
    tools = LlamaCpp.find()
    model = subject.model()
    wide = "f32" if str(model.dtype) == "torch.float32" else "bf16"
    kinds = [wide, *(["q8_0", "q4_k_m"] if tools.quantizer else [])]
    files = GgufWriter(tools, "checked").write(subject.folder, subject.scratch / "gguf", kinds=kinds)
    sizes = ", ".join(f"{kind.upper()} {file.stat().st_size / 1e6:.1f} MB" for kind, file in files.items())
    if not tools.quantizer:
        sizes += f"; not quantised: {remedy()}"
    if tools.binding is None:
        return f"{sizes}; {_continued(tools, files[wide], subject=subject)}"
    ids_BL, told = subject.ids(), []
    plain_LV = logits(model, ids_BL)[0]
    for kind, most in ((wide, _MOST), ("q8_0", _MOST_Q8)):
        if kind in files:
            found_LV = _logits(tools.binding, files[kind], subject=subject, ids=ids_BL[0].tolist())
            told.append(f"{kind.upper()} {divergence(plain_LV, found_LV, most=most, tool='llama.cpp')}")
    return f"{'; '.join(told)}; {sizes}"


def _logits(binding: tuple[str, ...], file: Path, *, subject: Subject, ids: list[int]) -> Tensor:
    """Return llama.cpp's logits [L, V] of the text. Raises ToolFailure where its tokens are other ones."""
    import torch

    job, values = subject.scratch / "job.json", subject.scratch / "logits.f32"
    job.write_text(json.dumps({"text": TEXT, "new_tokens": 0, "logits": str(values)}), encoding="utf-8")
    found = json.loads(run_tool((*binding, "logits", str(file), str(job)), "library").splitlines()[-1])
    if found["ids"] != ids:
        place = next((at for at, pair in enumerate(zip(found["ids"], ids, strict=False)) if len(set(pair)) > 1), None)
        raise ToolFailure(
            f"llama.cpp makes {len(found['ids'])} tokens of the text and transformers {len(ids)}"
            + ("" if place is None else f"; token {place + 1} is {found['ids'][place]} and not {ids[place]}")
        )
    flat = torch.frombuffer(bytearray(values.read_bytes()), dtype=torch.float32)
    return flat.view(len(ids), found["vocabulary"])


def _continued(tools: LlamaCpp, file: Path, *, subject: Subject) -> str:
    """Return what llama.cpp's own program makes of a text, where no library computes logits."""
    if tools.completion is None:
        return "not run: neither a Python binding of llama.cpp nor llama-completion is installed"
    options = ("-m", str(file), "-p", TEXT, "-n", str(_TOKENS), "--temp", "0", "-no-cnv", "--no-display-prompt")
    found = run_tool((*tools.completion, *options), "completion").strip()
    tokenizer, model, ids_BL = subject.tokenizer(), subject.model(), subject.ids()
    made_BL = model.generate(ids_BL.to(model.device), max_new_tokens=_TOKENS, do_sample=False)
    wanted = str(tokenizer.decode(made_BL[0, ids_BL.shape[1] :], skip_special_tokens=True)).strip()
    if not found or found.split()[0] != wanted.split()[0]:
        raise ToolFailure(f"llama.cpp goes on with {found[:40]!r}, and transformers with {wanted[:40]!r}")
    return f"{'the same' if found == wanted else 'nearly the same'} greedy text as transformers"


CHECK = ToolCheck("llama.cpp: GGUF", work, missing=missing)
