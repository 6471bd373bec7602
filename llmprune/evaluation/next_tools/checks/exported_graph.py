"""torch.export and ONNX: the model as a graph, which computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.evaluation.next_tools.base import Subject, ToolCheck, divergence, logits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_MOST = 1e-3  # nats


def exported(subject: Subject) -> str:
    """Export with torch.export, and run the program."""
    import torch

    model, ids_BL = _plain(subject)
    program = torch.export.export(model, (), {"input_ids": ids_BL, "use_cache": False}, strict=False)
    found_BLV = program.module()(input_ids=ids_BL, use_cache=False).logits
    return divergence(logits(model, ids_BL), found_BLV.float(), most=_MOST, tool="the exported program")


def onnx(subject: Subject) -> str:
    """Export to an ONNX file, and run it with onnxruntime."""
    import onnxruntime
    import torch

    model, ids_BL = _plain(subject)
    file = subject.scratch / "model.onnx"
    torch.onnx.export(_Logits.of(model), (ids_BL,), str(file), input_names=["input_ids"], dynamo=True)
    session = onnxruntime.InferenceSession(Path(file), providers=["CPUExecutionProvider"])
    found_BLV = torch.from_numpy(session.run(None, {"input_ids": ids_BL.numpy()})[0])
    return divergence(logits(model, ids_BL), found_BLV.float(), most=_MOST, tool="onnxruntime")


def _plain(subject: Subject) -> tuple[PreTrainedModel, Tensor]:
    """Return the model in float32 on the CPU, where both kinds of graph run, and token ids for it."""
    import torch

    return subject.model(dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager"), subject.ids()


class _Logits:
    """Modules whose only output are the logits of a model."""

    @staticmethod
    def of(model: PreTrainedModel) -> Any:
        """Wrap a model."""
        import torch

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Tensor) -> Tensor:
                found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
                return found

        return Logits().eval()


EXPORT = ToolCheck("torch.export", exported)
ONNX = ToolCheck("ONNX: onnxruntime", onnx, ("onnxruntime", "onnxscript"), "pip install onnxruntime onnxscript")
