"""Several processes of one command end, print and are stopped as one process is."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from llmprune.common.local_processes import run_processes

START = "import os, sys, time; rank = int(os.environ['RANK']); "


def _run(script: str, count: int = 2, **environment: str) -> int:
    return run_processes([sys.executable, "-c", START + script], count, environment=environment)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((2, 2), 2), ((1, 2), 2), ((3, 3, 3), 3), ((1, 1), 1), ((0, 1), 1), ((130, 130), 130)],
)
def test_the_exit_code_is_that_of_one_process(codes: tuple[int, ...], expected: int) -> None:
    """Where the first process ends only because another has failed, the other's code tells what is wrong."""
    assert _run(f"sys.exit({codes}[rank])", len(codes)) == expected


def test_the_first_process_prints_and_finishes(capfd: pytest.CaptureFixture[str]) -> None:
    """What it writes after another process has failed is complete; an explained error of the other is not repeated."""
    script = (
        "print(f'said by {rank}', flush=True); time.sleep(0 if rank else 0.5); print(f'end of {rank}'); sys.exit(2)"
    )
    assert _run(script) == 2
    assert capfd.readouterr() == ("said by 0\nend of 0\n", "")


def test_an_unexplained_end_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """A traceback of another process is printed, with escape sequences made visible."""
    assert _run("sys.exit(1) if not rank else print(chr(27), flush=True) or 1 / 0") == 1
    found = capfd.readouterr().err
    assert found.startswith("output of process 1 of 2:\n\\x1b\nTraceback (most recent call last):")
    assert "ZeroDivisionError" in found


def test_a_killed_process_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    """The others are ended at once, and the signal is named: the kernel sends it where memory is full."""
    since = time.monotonic()
    assert _run("os.kill(os.getpid(), 9) if rank else time.sleep(60)") == 143
    assert time.monotonic() - since < 30
    assert "llmprune: process 1 of 2 was ended by SIGKILL; the system does that" in capfd.readouterr().err


def test_each_process_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get torchrun's variables and the caller's, and share the processors unless the user has divided them."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
    script = (
        f"from pathlib import Path; found = ' '.join(os.environ[name] for name in {names}); "
        f"Path(f'{tmp_path}/{{rank}}').write_text(found)"
    )
    for threads in ("3", None):
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        if threads is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
            threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert _run(script, CUDA_VISIBLE_DEVICES="2,0") == 0
        assert (tmp_path / "0").read_text() == f"0 0 2 2,0 {threads}"
        assert (tmp_path / "1").read_text() == f"1 1 2 2,0 {threads}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_every_process_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A signal to this process alone is passed on; the handlers from before are in place afterwards."""
    script = (
        "import signal; from pathlib import Path; got = []; "
        f"signal.signal({int(number)}, lambda *_: got.append(1)); Path(f'{tmp_path}/{{rank}}').touch(); "
        f"[time.sleep(0.02) for _ in iter(lambda: bool(got), True)]; time.sleep(0.3); "
        f"Path(f'{tmp_path}/{{rank}}').write_text(str(len(got))); sys.exit({code})"
    )

    def stop() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    assert _run(script) == code
    thread.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "1", "1": "1"}
    assert signal.getsignal(number) is before
