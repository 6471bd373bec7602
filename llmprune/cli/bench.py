"""``llmprune bench``: two models loaded, measured in turn, printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from llmprune.checkpoint.loading import load_config, load_model
from llmprune.checkpoint.location import bytes_on_disk
from llmprune.common.files import require_file, write_text
from llmprune.common.progress import quiet_libraries
from llmprune.evaluation.bench.sparse_kernels import (
    converted,
    require_gpu,
    saved_bytes,
    sparse_projections,
    time_products,
)
from llmprune.evaluation.bench.speed_and_memory import decoded_bytes, joules, run_bench
from llmprune.planning.model_size import measure_size
from llmprune.recipe.model import ModelSource
from llmprune.report.bench_table import print_bench
from llmprune.results.schema import BenchFigures, BenchSize


def bench_models(
    model: ModelSource,
    against: ModelSource,
    *,
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    static_cache: bool,
    output: Path | None,
    console: Console,
) -> None:
    """Measure, print tables, and write the figures as JSON where a file is given."""
    quiet_libraries()
    if output is not None:
        require_file(output, option="--output", example="bench.json")
    for source in (against, model):
        load_config(source)
    models = load_model(against), load_model(model)
    sizes = _size(against, models[0]), _size(model, models[1])
    names = against.id, model.id
    figures = run_bench(
        names,
        models,
        sizes=sizes,
        batch_sizes=batch_sizes,
        contexts=contexts,
        new_tokens=new_tokens,
        repeats=repeats,
        static_cache=static_cache,
    )
    _show(figures, output, console=console)


def bench_sparse(
    model: ModelSource,
    batch_sizes: Sequence[int],
    *,
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    output: Path | None,
    console: Console,
) -> None:
    """Measure a model with its 2:4 matrices as they are stored, and as sparse tensor cores read them."""
    quiet_libraries()
    if output is not None:
        require_file(output, option="--output", example="bench.json")
    require_gpu()
    dense = load_model(model.model_copy(update={"device_map": {"": 0}}))  # split over several it could not be copied
    projections = sparse_projections(dense)
    tokens = sorted({size for batch in batch_sizes for size in (batch, *(batch * context for context in contexts))})
    products = time_products(dense, projections, tokens=tokens, repeats=repeats)
    sparse = converted(dense, list(projections))
    size, saved = _size(model, dense), saved_bytes(sparse, list(projections))
    read = size.decoded_bytes - saved
    smaller = {"weights": size.weights - saved, "decoded_bytes": read, "joules": joules(read)}
    sizes = size, size.model_copy(update=smaller)
    names = f"{model.id}, dense", f"{model.id}, 2:4"
    figures = run_bench(
        names,
        (dense, sparse),
        sizes=sizes,
        batch_sizes=batch_sizes,
        contexts=contexts,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    _show(figures.model_copy(update={"products": products}), output, console=console)


def _show(figures: BenchFigures, output: Path | None, *, console: Console) -> None:
    print_bench(figures, console)
    if output is not None:
        write_text(output, figures.model_dump_json(indent=1) + "\n")
        console.print(Text(f"written to {output}"), soft_wrap=True)


def _size(source: ModelSource, model: PreTrainedModel) -> BenchSize:
    size = measure_size(model, {}, experts=None, stored={})
    read = decoded_bytes(model)
    return BenchSize(
        parameters=size.parameters,
        weights=size.bytes,
        disk=bytes_on_disk(source),
        kv_bytes_per_token=size.kv_bytes_per_token,
        decoded_bytes=read,
        joules=joules(read),
    )
