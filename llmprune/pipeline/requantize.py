"""The result in its base's quantized format, where the recipe asks for it (``export.requantize``).

Shapes: N windows, L sequence length, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.location import headers_of, quantization_of_source
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.checkpoint.result.requantized import QuantizedBase, write_requantized
from llmprune.common.distributed import broadcast_from_first
from llmprune.common.errors import ModelError
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.finish import write_report
from llmprune.pipeline.step_costs import measure_step, with_forward_ratios
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.result_files import RequantizedFigures
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import QUANTIZED, QUANTIZED_MODEL, RECOVERY
from llmprune.results.run_folder.replacing import remove

_WINDOWS, _LENGTH = 4, 256  # of the calibration, on which the two checkpoints are compared


def requantize_as_requested(context: RunContext, report: Report) -> Report:
    """Write the result in the base's format, or reuse it; return the report with its figures.

    Every process calls this. The quantized checkpoint is read again, and compared with the one that it was made from.
    Raises ModelError where the format cannot express the result.
    """
    folder = context.folder
    if not context.whole_recipe.export.requantize:
        return report
    kept = [row.layer for row in report.layers if not row.removed]

    def make(path: Path) -> RequantizedFigures:
        with measure_step(folder.steps, "quantized result"):
            made = _write(context, kept)
        folder.write(path.name, made.model_dump_json(indent=1) + "\n")
        return made

    def load(path: Path) -> RequantizedFigures:
        found = RequantizedFigures.model_validate(json.loads(path.read_text(encoding="utf-8")))
        if _bytes(folder.path / QUANTIZED_MODEL) != found.bytes:
            raise ValueError(f"{QUANTIZED_MODEL} has another size")
        return found

    model = file_fingerprint(folder.path / "pruning.json", folder.path / RECOVERY)
    made = folder.produce("quantized", fingerprint(model), file=QUANTIZED, load=load, make=make)
    paths = {"quantized": str(folder.path / QUANTIZED_MODEL)}
    update = {"requantized": made, "files": report.files | paths, "steps": with_forward_ratios(folder.steps)}
    report = broadcast_from_first(report.model_copy(update=update))
    write_report(folder, report)
    return report


def _write(context: RunContext, kept: list[int]) -> RequantizedFigures:
    folder, source = context.folder.path, context.whole_recipe.model
    quantization, headers = quantization_of_source(source), headers_of(source)
    if quantization is None or headers is None:
        raise ModelError("export.requantize: the model is not quantized; leave requantize out")
    ids_NL = context.inputs.windows[:_WINDOWS, :_LENGTH]
    model = ModelSource(id=str(folder / "model"), trust_remote_code=source.trust_remote_code)
    logits_NLV, path = _logits(model, ids_NL)
    base = QuantizedBase(quantization, headers, kept, path)
    partial = folder / f"{QUANTIZED_MODEL}.partial"
    remove(partial)
    weights = write_requantized(folder / "model", partial, base=base)
    quantized_NLV, _ = _logits(model.model_copy(update={"id": str(partial)}), ids_NL)
    remove(folder / QUANTIZED_MODEL)
    partial.rename(folder / QUANTIZED_MODEL)
    return RequantizedFigures(
        format=quantization.describe(),
        weights=weights,
        bytes=_bytes(folder / QUANTIZED_MODEL),
        divergence=float(kl_divergence(logits_NLV.flatten(0, 1), quantized_NLV.flatten(0, 1)).mean()),
    )


@torch.no_grad()
def _logits(source: ModelSource, ids_NL: Tensor) -> tuple[Tensor, str]:
    """Return a model's logits, read and run layer by layer, and the path of its layers."""
    decoder = open_decoder(source)
    forward = LayerwiseForward(decoder, ids_NL, batch_size=1)
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    logits_NLV = torch.cat([forward.logits(batch).float().cpu() for batch in range(len(forward.batches))])
    return logits_NLV, find_layers(decoder.skeleton)[0]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
