"""Several processes of one command on this machine, which print and end as one process does.

They get torchrun's environment variables and meet in a store of this process. ``torch.distributed.run`` itself is not
used, because it ends the other processes in the middle of their messages as soon as one fails, and replaces their exit
codes by 1. Only the first process writes to this process's standard output and error. What the others wrote is shown
where they ended without an explanation: by a signal or with a traceback.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from llmprune.common.errors import GateNotMet, RecipeError, to_continue
from llmprune.common.printing import printable

_RUN_ID = "llmprune"
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TELLING = {RecipeError.exit_code, GateNotMet.exit_code}  # exit codes that tell more than that a run failed
# Seconds from the failure of one process until the others are asked to end, and from then until they are killed. Each
# ends by itself when it has read the message of the one that failed; ``peers`` gives it 60 s for that.
_PATIENCE = 75.0
_MERCY = 60.0
_POLL = 0.05
_SHOWN = 40  # lines


def is_own_process() -> bool:
    """Check whether this process is one that ``run_processes`` started."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID


def is_first_of_launcher() -> bool:
    """Check whether this is the first of a launcher's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class _Process:
    """One of the processes. ``output``: file with what it wrote; None for the first, which writes to the terminal."""

    rank: int
    popen: subprocess.Popen[bytes]
    output: Path | None
    overdue: bool = False  # it did not end when it was asked to

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self.popen.poll()

    def tail(self) -> str:
        """Return the last lines that it wrote to its file."""
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output else ""
        return "\n".join(text.splitlines()[-_SHOWN:])


@dataclass
class _Processes:
    """All processes of one run."""

    started: list[_Process] = field(default_factory=list)
    signalled: bool = False  # by a person or a service, through this process

    def send(self, number: int) -> None:
        """Send a signal to the processes that still run."""
        for one in self.started:
            if one.code is None:
                one.popen.send_signal(number)

    def wait(self) -> None:
        """Wait until all have ended; where one fails, let the others end by themselves before they are made to."""
        failed_at: float | None = None
        asked = False
        while any(one.code is None for one in self.started):
            time.sleep(_POLL)
            codes = [one.code for one in self.started]
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
            if failed_at is None:
                continue
            passed = time.monotonic() - failed_at
            killed = any(code is not None and code < 0 for code in codes)  # it left no message that others can read
            if not asked and (killed or passed > _PATIENCE):
                asked = True
                self.send(signal.SIGTERM)
            if passed > _PATIENCE + _MERCY:
                self.kill()

    def kill(self) -> None:
        """Kill the processes that still run."""
        for one in self.started:
            one.overdue |= one.code is None
        self.send(signal.SIGKILL)


def run_processes(command: Sequence[str], count: int, *, environment: Mapping[str, str]) -> int:
    """Run ``count`` processes of a command until all have ended, and return the exit code of the whole.

    ``environment``: variables for all of them. SIGINT, SIGTERM and SIGHUP are passed on to the processes, which are in
    sessions of their own, so that each gets a Ctrl-C once.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # absent from its __all__

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    share = max(1, len(os.sched_getaffinity(0)) // count)  # of the processors
    shared = {"OMP_NUM_THREADS": str(share), **os.environ, **environment, **_torchrun(store.port, count)}
    processes = _Processes()
    with TemporaryDirectory(prefix="llmprune-") as folder, _signals_passed_on(processes):
        try:
            for rank in range(count):
                output = Path(folder) / f"process-{rank}.txt" if rank else None
                processes.started.append(_start(command, rank, environment=shared, output=output))
            processes.wait()
        finally:
            processes.kill()
        code = _exit_code([one.popen.wait() for one in processes.started])
        if code and not processes.signalled:
            _show_unexplained(processes.started)
    return code


def _torchrun(port: int, count: int) -> dict[str, str]:
    """Return the variables by which torch and accelerate find the other processes."""
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": _RUN_ID,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _start(command: Sequence[str], rank: int, *, environment: Mapping[str, str], output: Path | None) -> _Process:
    own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if output is None:
        return _Process(rank, subprocess.Popen(command, env=own, start_new_session=True), None)
    with output.open("wb") as file:
        popen = subprocess.Popen(
            command, env=own, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    return _Process(rank, popen, output)


@contextmanager
def _signals_passed_on(processes: _Processes) -> Iterator[None]:
    """Pass signals to end on to the processes while the block runs."""

    def pass_on(number: int, frame: object) -> None:
        processes.signalled = True
        processes.send(number)

    before = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(codes: Sequence[int]) -> int:
    """Return the exit code that one process would have had.

    It is that of the first process; where that only failed because of another, the other's if it tells more.
    """
    ended = [128 - code if code < 0 else code for code in codes]
    if ended[0] > 1:
        return ended[0]
    telling = next((code for code in ended if code in _TELLING), 0)
    return telling or ended[0] or max(ended)


def _show_unexplained(processes: Sequence[_Process]) -> None:
    """Print what processes wrote that no message of the first explains, and the signals that ended them."""
    count, silent = len(processes), processes[0].popen.returncode < 0
    for one in processes:
        code, tail = one.popen.returncode, one.tail()
        if tail and (code < 0 or "Traceback (most recent call last)" in tail or (silent and code)):
            sys.stderr.write(f"output of process {one.rank} of {count}:\n{printable(tail, newlines=True)}\n")
        if one.overdue:
            sys.stderr.write(f"llmprune: process {one.rank} of {count} did not end by itself, and was killed\n")
        elif code < 0:
            full = "; the system does that where memory is full" if -code == signal.SIGKILL else ""
            name = signal.Signals(-code).name
            sys.stderr.write(f"llmprune: process {one.rank} of {count} was ended by {name}{full}; {to_continue()}\n")
    sys.stderr.flush()
