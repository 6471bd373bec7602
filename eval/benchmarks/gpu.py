"""Figures of one GPU: its tests, both passes on random Llamas of 1 B and 8 B, time in copies and waits, speed.

    python eval/benchmarks/gpu.py [--minutes 8]
    python eval/benchmarks/gpu.py --tiny         # the same code on tiny models, also without a GPU

Each part runs in a process of its own, so that one that fails leaves the others. The 8 B part is last: it takes as
many windows as fit the time left, by the speed of the 1 B part, or is left out. After each part the figures are
written, with the machine they came from, into eval/benchmarks/results/gpu-NAME.json; a table is printed at the end.
Needs llmprune's own packages, pytest for the tests, and no network. The 8 B model has fewer layers where a GPU or the
disk in $TMPDIR is too small for 32; all of them need a GPU of 27 GB and 50 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # llmprune of this checkout, also where it is not installed

from common import RESULTS, write_record  # after the path
from gpu_parts import PARTS, REAL, TINY, Scale, Small, gpu_name

Figures = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """Time that the whole benchmark may take. ``end``: of time.monotonic()."""

    end: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()


def run_part(name: str, scale: Scale, *, budget: Budget, small: Small | None, here: bool) -> Figures:
    """Return a part's figures and seconds, or why there are none. ``here``: in this process, without a time limit."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmprune-gpu-") as place:
        folder = Path(place)
        arguments = (name, scale, folder, budget.left, small)
        if here:
            _work(*arguments)
        else:
            process = multiprocessing.get_context("spawn").Process(target=_work_in_group, args=arguments)
            with _first_gpu() if name != "tests" else nullcontext():  # tests also use a second one
                process.start()
            process.join(max(budget.left, 1))
            if process.is_alive():
                assert process.pid is not None
                with suppress(ProcessLookupError):  # it leads no group yet
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
                return {"skipped": f"stopped after {time.monotonic() - began:.0f} s: the time was over"}
        result = folder / "figures.json"
        if not result.is_file():
            return {"failed": "its process died; see its messages above"}
        figures: Figures = json.loads(result.read_text())
        return {"seconds": round(time.monotonic() - began, 1)} | figures


@contextmanager
def _first_gpu() -> Iterator[None]:
    """Show only the first GPU to the processes that start; their libraries look while they are imported."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = (before or "0").split(",")[0]
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _work_in_group(name: str, scale: Scale, folder: Path, seconds: float, small: Small | None) -> None:
    """Run a part as the leader of a process group, which its own processes are in."""
    os.setsid()
    _work(name, scale, folder, seconds, small)


def _work(name: str, scale: Scale, folder: Path, seconds: float, small: Small | None) -> None:
    """Run a part and write its figures, or its error, into ``folder``."""
    try:
        figures = PARTS[name](folder, scale, seconds, small)
    except Exception as error:  # whatever ends a part must not end the others
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"[:500]}
    (folder / "figures.json").write_text(json.dumps(figures))


def table(figures: Figures) -> str:
    """Return the figures as a table in Markdown."""
    rows: list[tuple[str, str]] = []
    for name, part in figures.items():
        said = part.get("failed") or part.get("skipped")
        lines = [f"**{said}**"] if said else _LINES[name](part)
        rows += [(name if not index else "", line) for index, line in enumerate(lines)]
    return "\n".join(["| part | figures |", "|---|---|", *(f"| {name} | {line} |" for name, line in rows)])


def _test_lines(part: Figures) -> list[str]:
    return [f"{part['passed']} passed, {part['skipped_tests']} skipped, {len(part['failures'])} failed"]


def _run_lines(part: Figures) -> list[str]:
    head = f"{part['parameters'] / 1e9:.1f} B parameters, {part['windows']} × {part['length']} tokens"
    lines = [f"{head}: both passes {part['forward_passes']:.2f} × a plain forward pass"]
    for step in part["steps"]:
        speed = f", {step['tokens_per_second']:,.0f} tokens/s" if step["tokens_per_second"] else ""
        peak = f", {step['peak_device'] / 1e9:.2f} GB on the device" if step["peak_device"] else ""
        lines.append(f"{step['name']}: {step['seconds']:.1f} s{speed}{peak}")
    return lines


def _profile_lines(part: Figures) -> list[str]:
    return [
        f"{step}: kernels {shares['kernels']:.0%}, copies {shares['copies']:.0%} (alone {shares['copies_alone']:.0%}), "
        f"idle {shares['idle']:.0%}; host waits {shares['waits']:.0%}, {shares['waits_per_layer']:.1f} a layer"
        for step, shares in part["shares"].items()
    ]


def _decode_lines(part: Figures) -> list[str]:
    return [
        f"{name}, batch {point['batch_size']}, context {point['context']}: {point['dense']:.1f} → "
        f"{point['pruned']:.1f} tokens/s ({point['ratio']:.2f} ×)"
        for name, points in part["decoding"].items()
        for point in points
    ]


def _sparse_lines(part: Figures) -> list[str]:
    return [
        f"{product['outputs']} × {product['inputs']}, {product['tokens']} tokens: {product['dense']:.3f} → "
        f"{product['sparse']:.3f} ms"
        for product in part["products"]
    ]


_LINES: dict[str, Callable[[Figures], list[str]]] = {
    "tests": _test_lines,
    "1 B": _run_lines,
    "profile": _profile_lines,
    "decoding": _decode_lines,
    "2:4": _sparse_lines,
    "8 B": _run_lines,
}


def main() -> None:
    """Measure every part, write the figures and print them; exit with 1 where a part or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for everything (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, in this process, without the GPU tests")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts to run")
    arguments = parser.parse_args()
    budget = Budget(time.monotonic() + 60 * arguments.minutes)
    scale = TINY if arguments.tiny else REAL
    if not arguments.tiny and not shutil.which("nvidia-smi"):
        print("no nvidia-smi here: this benchmark is for a machine with an NVIDIA GPU, or give --tiny", file=sys.stderr)
    name = "gpu-" + ("tiny" if arguments.tiny else re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-"))
    figures: Figures = {}
    small = None
    for part in arguments.only or [part for part in PARTS if not (arguments.tiny and part == "tests")]:
        print(f"{part} ({budget.left:.0f} s left)", file=sys.stderr, flush=True)
        figures[part] = run_part(part, scale, budget=budget, small=small, here=arguments.tiny)
        if part == "1 B" and "steps" in figures[part]:
            small = Small.of(figures[part])
        write_record(name, figures, arguments.output)
    print(table(figures))
    failures = [part for part, found in figures.items() if found.get("failed") or found.get("failures")]
    sys.exit(f"failed: {', '.join(failures)}" if failures else 0)


if __name__ == "__main__":
    main()
