"""Output that README and documentation show is what the commands print."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from generate.results import quickstart
from helpers.devices import simulated_devices
from helpers.reports import sample_report, summary
from helpers.tiny import structure_of
from rich.console import Console
from transformers import LlamaConfig

from llmprune.planning.plan_schema import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.report.plan_table import print_plan
from llmprune.results.figures.evaluation import (
    AgreementFigures,
    BarFigures,
    DivergenceFigures,
    FreeText,
    GateFigures,
    GenerationFigures,
    Interval,
    PerplexityFigures,
    RetentionFigures,
    SpeedFigures,
    TaskFigures,
)
from llmprune.results.figures.model_size import Size
from llmprune.results.report_schema import Report
from llmprune.results.sentences.evaluation import describe_verdict

ROOT = Path(__file__).parents[1]
INTERVAL = Interval(low=0.740, high=0.876, confidence=0.95)
AGREEMENT = AgreementFigures(
    share=0.546, interval=Interval(low=0.388, high=0.673, confidence=0.95),
    first_mean=0.5, first_mean_interval=Interval(low=0.0, high=1.5, confidence=0.95),
    first_median=0.0, first_median_interval=Interval(low=0.0, high=0.0, confidence=0.95),
    whole=0.0, tokens=357, samples=8,
)  # fmt: skip
NO_ANSWERS = (
    "layers are removed and no task generates answers: without layers generated reasoning breaks long before multiple "
    "choice shows it (published for 32 of 36 layers: MMLU stays at 0.740, GSM8K falls to 0.287); add gsm8k or another "
    "generating task to evaluation.tasks, or set evaluation.suite to general"
)


def size(*, parameters: int, layers: int, width: int) -> Size:
    """Return the size of a SmolLM2-135M in float32."""
    widths = {"intermediate_size": width}
    kv_bytes = 2 * layers * 192 * 4
    return Size(
        parameters=parameters, bytes=4 * parameters, layers=layers, widths=widths, experts=None,
        kv_bytes_per_token=kv_bytes,
    )  # fmt: skip


def free_text(repetition: float, loops: float) -> FreeText:
    """Return statistics of free text."""
    return FreeText(repetition=repetition, loops=loops, empty=0.0, tokens=48.0)


def quickstart_report() -> Report:
    """Return a report with the recorded figures of the quickstart."""
    retention = 0.725 / 0.9
    task = TaskFigures(
        task="llmprune_agreement", metric="acc", dense=0.9, pruned=0.725, retention=retention, interval=INTERVAL,
        samples=200, lost=None, gained=None, p_value=None,
    )  # fmt: skip
    mean = RetentionFigures(
        retention=retention, interval=INTERVAL, counted=("llmprune_agreement",), left_out=(), samples=200
    )
    folder = "runs/quickstart"
    return sample_report(
        dense=size(parameters=134_515_008, layers=30, width=1536),
        pruned=size(parameters=108_855_360, layers=28, width=1152),
        perplexity=PerplexityFigures(dense=18.362, cut=39.671, pruned=28.442, tokens=3060, source="text"),
        divergence=DivergenceFigures(mean=0.494, quantiles={"0.5": 0.264}, same_first=0.701, tokens=3060),
        tasks=(task,),
        mean_retention=retention,
        retention=mean,
        generation=GenerationFigures(
            dense=free_text(0.057, 0.0), pruned=free_text(0.204, 0.125), text=None, agreement=AGREEMENT,
            source="questions in the chat template", samples=8, prompt_tokens=61, new_tokens=48, examples=(),
        ),
        speed=SpeedFigures(
            dense=15.103, pruned=17.737, ratio=1.174, ratio_low=1.150, ratio_high=1.210, batch_size=1, prompt_tokens=64,
            new_tokens=32, repeats=3, device="cpu",
        ),
        gate=None,
        warnings=(NO_ANSWERS,),
        files={"model": f"{folder}/model", "report": f"{folder}/report.html", "figures": f"{folder}/report.json"},
    )  # fmt: skip


def lines(text: str) -> list[str]:
    """Return the lines that are not empty, without trailing spaces."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def printed(plan: Plan) -> str:
    """Return the plan as a terminal of 80 columns prints it."""
    console = Console(file=io.StringIO(), width=80)
    print_plan(plan, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_quickstart_prints_the_table_of_the_readme() -> None:
    """Labels, columns and order are those of a finished run."""
    assert lines(summary(quickstart_report())) == lines(quickstart().replace("```", ""))


def test_the_planned_run_is_planned_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """*Plan your run* shows what ``llmprune plan`` prints for the ready recipe on a GPU, but its notes."""
    monkeypatch.chdir(tmp_path)  # a short name: the first line must not be broken
    LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=131072,
    ).save_pretrained("llama")  # fmt: skip
    with simulated_devices(1, memory=80 * 10**9):
        plan = structure_of(Recipe.load(ROOT / "recipes/llama-3.1-8b.yaml", ["model.id=llama"]))
    gpu, host = plan.devices
    plan = plan.model_copy(update={"devices": (gpu, host.model_copy(update={"free": 256 * 10**9}))})
    page = (ROOT / "docs/plan-your-run.md").read_text(encoding="utf-8")
    shown = page.partition("```\nmeta-llama/Llama-3.1-8B (llama, bfloat16)\n")[2].partition("```")[0]
    assert lines(shown) == lines(printed(plan).partition("Note:")[0])[1:]


def test_the_undecided_gate_is_quoted_in_its_words() -> None:
    """The guide quotes the message of a gate that needs more samples."""
    bar = BarFigures(
        name="mean", minimum=0.9, measured=0.8207, interval=Interval(low=0.728, high=0.9374, confidence=0.95),
        verdict="not enough samples", samples=200, samples_needed=885,
    )  # fmt: skip
    gate = GateFigures(
        min_retention=0.9, retention=0.8207, passed=False, confidence=0.95, verdict=bar.verdict, bars=(bar,)
    )
    guide = (ROOT / "docs/guides/evaluation-and-gate.md").read_text(encoding="utf-8")
    assert describe_verdict(gate) in re.sub(r"\s+", " ", guide)
