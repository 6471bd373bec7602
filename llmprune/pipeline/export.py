"""Export of a run's checkpoint as GGUF files, where the recipe asks for them."""

from __future__ import annotations

import json
from pathlib import Path

from llmprune.checkpoint.llama_cpp.tools import LlamaCpp
from llmprune.checkpoint.llama_cpp.write_gguf import GgufWriter
from llmprune.common.distributed import broadcast_from_first
from llmprune.common.files import write_text
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.finish import write_report
from llmprune.pipeline.step_costs import measure_step, with_forward_ratios
from llmprune.results.figures.result_files import GgufFigures
from llmprune.results.formatting import short_model_name
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import GGUF, GGUF_FILES, RECOVERY
from llmprune.results.run_folder.replacing import remove

_MARK = ".model"  # file with the fingerprint of the model that the files are of


def export_as_requested(context: RunContext, report: Report) -> Report:
    """Write the recipe's GGUF files, or reuse those in the run folder; return the report with them.

    Every process calls this. Raises ModelError where llama.cpp's tools refuse the model.
    """
    kinds, folder = context.recipe.export.gguf, context.folder
    if not kinds:
        return report
    model = file_fingerprint(folder.path / "pruning.json", folder.path / RECOVERY)

    def make(path: Path) -> tuple[GgufFigures, ...]:
        with measure_step(folder.steps, "GGUF files"):
            files = _write(context, model)
        made = tuple(
            GgufFigures(kind=kind, file=f"{GGUF_FILES}/{file.name}", bytes=file.stat().st_size)
            for kind, file in files.items()
        )
        folder.write(path.name, json.dumps([one.model_dump() for one in made], indent=1) + "\n")
        return made

    def load(path: Path) -> tuple[GgufFigures, ...]:
        found = tuple(GgufFigures.model_validate(one) for one in json.loads(path.read_text(encoding="utf-8")))
        for one in found:
            if (folder.path / one.file).stat().st_size != one.bytes:
                raise ValueError(f"{one.file} has another size")
        return found

    made = folder.produce("gguf", fingerprint(model, *kinds), file=GGUF, load=load, make=make)
    paths = {f"gguf {one.kind}": str(folder.path / one.file) for one in made}
    update = {"gguf": made, "files": report.files | paths, "steps": with_forward_ratios(folder.steps)}
    report = broadcast_from_first(report.model_copy(update=update))
    write_report(folder, report)
    return report


def _write(context: RunContext, model: str) -> dict[str, Path]:
    """Write the files that are not there yet. ``model``: fingerprint, by which files of another model are known."""
    place, recipe = context.folder.path / GGUF_FILES, context.whole_recipe
    mark = place / _MARK
    if not mark.is_file() or mark.read_text(encoding="ascii") != model:
        remove(place)
        place.mkdir()
        write_text(mark, model)
    writer = GgufWriter(LlamaCpp.find(), f"{short_model_name(recipe.model.id)} pruned")
    files = writer.write(context.folder.path / "model", place, kinds=context.recipe.export.gguf)
    for file in set(place.glob("*.gguf")) - {*files.values()}:  # of kinds that the recipe does not name any more
        remove(file)
    return files
