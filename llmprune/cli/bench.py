"""``llmprune bench``: two models loaded, measured in turn, printed and written."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.loading import load_config, load_model
from llmprune.checkpoint.location import bytes_on_disk
from llmprune.checkpoint.model_memory import fit_together, memory_for_models, whole_model_bytes
from llmprune.common.errors import ModelError
from llmprune.common.files import write_text
from llmprune.common.libraries import quiet_libraries
from llmprune.common.schema import format_size
from llmprune.evaluation.bench.sparse_kernels import (
    converted,
    require_gpu,
    saved_bytes,
    sparse_projections,
    time_products,
)
from llmprune.evaluation.bench.speed_and_memory import BenchModel, BenchSettings, decoded_bytes, joules, run_bench
from llmprune.planning.sizes.model_size import measure_size
from llmprune.recipe.model import ModelSource
from llmprune.report.bench_table import print_bench
from llmprune.results.figures.bench import BenchFigures, BenchSize


def bench_models(
    model: ModelSource, against: ModelSource, *, settings: BenchSettings, output: Path | None, console: Console
) -> None:
    """Measure, print tables, and write the figures as JSON where a file is given."""
    quiet_libraries()
    for source in (against, model):
        load_config(source)
    _require_memory(against, model)
    base, other = _bench_model(against), _bench_model(model)
    _show(run_bench(base, other, settings=settings), output, console=console)


def bench_sparse(model: ModelSource, *, settings: BenchSettings, output: Path | None, console: Console) -> None:
    """Measure a model with its 2:4 matrices as they are stored, and as sparse tensor cores read them."""
    quiet_libraries()
    require_gpu()
    on_one = model.model_copy(update={"device_map": {"": 0}})  # split over several it could not be copied
    _require_memory(on_one, on_one)
    dense = load_model(on_one)
    projections = sparse_projections(dense)
    tokens = sorted(
        {
            size
            for batch in settings.batch_sizes
            for size in (batch, *(batch * context for context in settings.contexts))
        }
    )
    products = time_products(dense, projections, tokens=tokens, repeats=settings.repeats)
    sparse = converted(dense, list(projections))
    size, saved = _size(model, dense), saved_bytes(sparse, list(projections))
    read = size.decoded_bytes - saved
    smaller = size.model_copy(update={"weights": size.weights - saved, "decoded_bytes": read, "joules": joules(read)})
    figures = run_bench(
        BenchModel(f"{model.id}, dense", dense, size),
        BenchModel(f"{model.id}, 2:4", sparse, smaller),
        settings=settings,
    )
    _show(figures.model_copy(update={"products": products}), output, console=console)


def _require_memory(base: ModelSource, other: ModelSource) -> None:
    """Raise ModelError where both models do not fit in memory together: parts on disk would be timed instead."""
    if fit_together([base, other]):
        return
    sizes = [format_size(whole_model_bytes(source)) for source in (base, other)]
    free = format_size(min(map(memory_for_models, (base, other))))
    raise ModelError(
        f"bench times two models that are in memory together: {base.id} needs {sizes[0]} and {other.id} {sizes[1]}, "
        f"and {free} are free for weights; give --dtype bfloat16 if they are in float32, end other programs, or use a "
        "machine with more memory"
    )


def _bench_model(source: ModelSource) -> BenchModel:
    model = load_model(source)
    return BenchModel(source.id, model, _size(source, model))


def _show(figures: BenchFigures, output: Path | None, *, console: Console) -> None:
    print_bench(figures, console)
    if output is not None:
        write_text(output, figures.model_dump_json(indent=1) + "\n")
        console.print(Text(f"written to {output}"), soft_wrap=True)


def _size(source: ModelSource, model: PreTrainedModel) -> BenchSize:
    size = measure_size(model, KeptSizes(tuple(range(len(find_layers(model)[1])))), stored={})
    read = decoded_bytes(model)
    return BenchSize(
        parameters=size.parameters,
        weights=size.bytes,
        disk=bytes_on_disk(source),
        kv_bytes_per_token=size.kv_bytes_per_token,
        decoded_bytes=read,
        joules=joules(read),
    )
