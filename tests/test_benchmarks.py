"""The GPU benchmark: it runs on tiny models without a GPU, and reads times correctly from a profile."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "eval" / "benchmarks"


@pytest.fixture
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmarks' modules importable."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def _event(cat: str, name: str, start: float, end: float) -> dict[str, object]:
    """Return an event of a trace. ``start`` and ``end``: milliseconds."""
    return {"ph": "X", "cat": cat, "name": name, "ts": 1000 * start, "dur": 1000 * (end - start)}


@pytest.mark.usefixtures("_benchmarks")
def test_shares_of_time_count_overlaps_once() -> None:
    """Parallel kernels count once, copies beside a kernel are not alone, and other steps' events do not count."""
    from device_time import time_shares

    trace = [
        _event("user_annotation", "pass 1", 0, 100),
        _event("user_annotation", "pass 2", 100, 300),
        _event("kernel", "gemm", 100, 160),
        _event("kernel", "gemm on another stream", 140, 180),
        _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 170, 200),
        _event("kernel", "ends after the step", 290, 350),
        _event("cuda_runtime", "cudaStreamSynchronize", 180, 200),
        _event("cuda_runtime", "cudaLaunchKernel", 200, 210),
        {"ph": "M", "name": "process_name"},
    ]
    assert time_shares(trace, "pass 2") == {
        "seconds": 0.2,
        "kernels": 0.45,
        "copies": 0.15,
        "copies_alone": 0.1,
        "idle": 0.45,
        "waits": 0.1,
        "wait_calls": 1,
    }
    assert time_shares(trace, "pass 1")["idle"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_benchmarks", "in_one_process")
def test_gpu_benchmark_runs_on_tiny_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part gives figures; where there is no GPU, the part on 2:4 kernels says so."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    assert ended.value.code == 0
    recorded = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert recorded["machine"]["versions"]["torch"]
    figures = recorded["figures"]
    for part in ("1 B", "8 B"):
        assert figures[part]["forward_passes"] > 0
        assert {step["name"] for step in figures[part]["steps"]} >= {"plain forward pass", "pass 1", "pass 2"}
    assert figures["profile"]["shares"]["pass 2"]["seconds"] > 0
    assert all(point["dense"] > 0 for points in figures["decoding"]["decoding"].values() for point in points)
    assert "products" in figures["2:4"] or "no CUDA GPU" in figures["2:4"]["skipped"]
    assert f"both passes {figures['8 B']['forward_passes']:.2f} ×" in capsys.readouterr().out
