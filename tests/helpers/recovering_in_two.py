"""Recoveries by two processes: ``python -m helpers.recovering_in_two FOLDER``, where FOLDER has the pairs of models.

The two are forks of this process, so that they share its imports.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helpers.recovering import recovery
from llmprune.common.distributed import leave_process_group, synchronized
from llmprune.recover.recovery import Recovered


class StopError(Exception):
    """The end of a run that is killed."""


@dataclass(frozen=True)
class Case:
    """A recovery of a pair of models, which is killed before it if ``killed_after`` so many steps."""

    pair: str
    settings: dict[str, Any] = field(default_factory=dict)
    killed_after: int | None = None

    def run(self, root: Path, folder: Path) -> Recovered:
        """Run the recovery of the pair in ``root``, with its work files in ``folder``."""
        folders = root / self.pair / "dense", root / self.pair / "repaired"
        return recovery(folders, folder, precision="float32", **self.settings).run()


CASES = {
    "full": Case("llama"),
    "killed": Case("llama", killed_after=3),
    "lora": Case("zeros", {"method": "lora"}),
    "zeros": Case("zeros"),
    "bfloat16": Case("bfloat16", {"method": "lora"}),
    "hidden states": Case("llama", {"hidden_states": 0.5}),
    "setback": Case("llama", {"learning_rate": 0.9, "warmup": 0.0, "embeddings": True}),
}


def recover_all(root: Path) -> None:
    """Recover every case into ``root / "two"``."""
    for name, case in CASES.items():
        folder = root / "two" / name
        with synchronized():
            if case.killed_after is not None:
                _kill(case, root, folder)
            found = case.run(root, folder)
        if os.environ["RANK"] == "0":
            (folder / "found.json").write_text(found.progress.model_dump_json())
    leave_process_group()


def _kill(case: Case, root: Path, folder: Path) -> None:
    """Run a recovery until the optimiser has made the case's number of steps."""
    step, made = torch.optim.AdamW.step, 0

    def stop(self: torch.optim.AdamW, closure: None = None) -> None:
        nonlocal made
        if made == case.killed_after:
            raise StopError
        made += 1
        step(self, closure)

    torch.optim.AdamW.step = stop
    try:
        case.run(root, folder)
    except StopError:
        pass
    finally:
        torch.optim.AdamW.step = step


def _fork(root: Path, rank: int) -> int:
    """Start one of the processes and return its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        recover_all(root)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    children = [_fork(Path(sys.argv[1]), rank) for rank in (0, 1)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
