"""``llmprune`` in two processes of torchrun's agent: ``python -m helpers.in_two ARGUMENTS``.

The two are forks of this process, so that they share its imports, and verify in themselves.
"""

from __future__ import annotations

import sys

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import llmprune.pipeline.run  # noqa: F401  # for both
from helpers.commands import verify_here
from llmprune.cli.main import main


def _run(arguments: list[str]) -> None:
    sys.argv = ["llmprune", *arguments]
    verify_here(pytest.MonkeyPatch())
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    both = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
    )
    elastic_launch(both, _run)(sys.argv[1:])
