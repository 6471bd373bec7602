"""Repairs of a kept layer in the order in which they are made. A new repair is one file and one line here."""

from __future__ import annotations

from llmprune.prune.repair.base import LayerRepair
from llmprune.prune.repair.block_training import BlockTraining
from llmprune.prune.repair.output_projection import OutputProjectionRefit
from llmprune.prune.repair.routed_experts import RoutedExpertRefit
from llmprune.prune.repair.token_mixer import TokenMixerRefit
from llmprune.prune.repair.up_projection import UpProjectionRefit

REPAIRS: tuple[LayerRepair, ...] = (
    TokenMixerRefit(),
    UpProjectionRefit(),
    RoutedExpertRefit(),
    OutputProjectionRefit(),
    BlockTraining(),
)
