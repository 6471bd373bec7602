"""Several processes for one job: one for each GPU, on this machine or, with the operator's options, on several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers.base import Launch
from llmprune.service.supervisor.launchers.local import Local


class Torchrun(Local):
    """``torchrun --nproc-per-node GPUS [OPTIONS] -m llmprune …``.

    For several nodes the options name them, as in ``--nnodes 2 --node-rank 0 --rdzv-endpoint HOST:PORT``. Then all
    nodes see the run folder at the same path, and the other nodes start torchrun themselves.
    """

    gpu_host: ClassVar[str] = "each node"

    def __init__(self, command: Sequence[str], options: Sequence[str] = (), *, store: str | None = None) -> None:
        super().__init__(command, store)
        self.options = tuple(options)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make the launcher with the operator's options of torchrun."""
        return cls(settings.command, settings.torchrun_options, store=settings.artifacts)

    def command_of(self, launch: Launch) -> tuple[str, ...]:
        """Return the command line of an attempt: torchrun between Python and the program."""
        python, *program = self.command
        torchrun = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(max(1, launch.gpus)))
        return (*torchrun, *(self.options or ("--standalone",)), *program, *launch.arguments)
