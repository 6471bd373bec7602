"""The command ``speed``, which measures a speed table. Its body imports late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli.options import Dtype, Gpus, console, model_source, use_gpus
from llmprune.common.files import require_file
from llmprune.common.libraries import import_libraries, quiet_libraries
from llmprune.common.progress import lines_without_terminal


def speed(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, folder (config.json suffices), adapter or GGUF file."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the table, as JSON.")],
    *,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each prompt.")] = 64,
    repeats: Annotated[
        int,
        typer.Option(min=2, help="Timed runs of each model, after a warm-up; twice as many where they differ."),
    ] = 5,
    dtype: Dtype = "auto",
    devices: Gpus = "all",
) -> None:
    """Measure the times of a model's parts on this machine, for a speed budget (`budget.speed_table`).

    Models with the sizes of MODEL and random weights are timed; no weights are read. A budget on this machine uses the
    table without the file.
    """
    source = model_source(model, dtype=dtype)
    require_file(output, option="--output", example="table.json")
    import_libraries(announced=True)
    from llmprune.common.device_errors import device_errors
    from llmprune.evaluation.bench.generation_speed import require_positions
    from llmprune.evaluation.bench.speed_prediction import dense_shape, predict
    from llmprune.evaluation.bench.speed_subject import SpeedSubject
    from llmprune.evaluation.bench.speed_table import measure_and_keep, write_table
    from llmprune.recipe.evaluation import Speed
    from llmprune.report.speed_table import print_speed_table

    quiet_libraries()
    use_gpus(devices)
    settings = Speed(batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    with (
        lines_without_terminal(),
        device_errors("give a lower --batch-size or --prompt-tokens, or use a GPU with more memory"),
    ):
        subject = SpeedSubject.of(source)
        require_positions(settings, subject.config, section="--prompt-tokens, --new-tokens")
        table = measure_and_keep(subject, settings=settings)
    print_speed_table(table, predict(table, dense_shape(table.sizes)), console=console())
    write_table(output, table)
    console().print(f"written to {output}", markup=False, highlight=False, soft_wrap=True)
