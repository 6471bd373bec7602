"""Recoveries of tiny models: a dense model, a damaged copy that stands for the repaired one, and random windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.common.out_of_memory import BatchSize
from llmprune.data.recovery_windows import RecoveryWindows
from llmprune.layerwise.decoder import Decoder
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recover import Recover
from llmprune.recover.arithmetic import Arithmetic
from llmprune.recover.beside import MatchingLayers
from llmprune.recover.recovery import Recovery
from llmprune.testing import VOCABULARY, tiny_model

LENGTH, WINDOWS, HELD_OUT, LAYERS = 16, 24, 4, 4


def save_pair(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, zeros: bool = False
) -> tuple[Path, Path]:
    """Save a dense model and a copy with noise in its layers; return their folders.

    ``zeros``: two of four weights of every MLP projection of the copy are zero.
    """
    model = tiny_model(family).to(dtype)
    model.save_pretrained(folder / "dense")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "layers" in name:
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * 0.5
                weight += noise.to(dtype)
                if zeros and "mlp" in name:
                    weight.view(-1, 4)[:, :2] = 0.0
    model.save_pretrained(folder / "repaired")
    return folder / "dense", folder / "repaired"


def matching(dense: Path, weight: float) -> MatchingLayers:
    """Return every layer of a dense model, to be compared with the same one of its copy."""
    return MatchingLayers(lambda: open_decoder(ModelSource(id=str(dense))), tuple(range(LAYERS)), weight)


def recovery(
    pair: tuple[Path, Path],
    folder: Path,
    *,
    windows: RecoveryWindows | None = None,
    end: bool = False,
    save_memory: bool = False,
    **settings: Any,
) -> Recovery:
    """Return a recovery of the pair's second model towards its first."""
    dense, repaired = (ModelSource(id=str(one)) for one in pair)
    opened: list[Decoder] = []

    def open_dense() -> Decoder:
        if not opened:
            opened.append(open_decoder(dense))
        return opened[0]

    asked = {"tokens": 6 * 4 * LENGTH, "batch_tokens": 4 * LENGTH, "check_every": 2, "learning_rate": 3e-3}
    chosen = Recover(**asked | settings)
    return Recovery(
        repaired,
        open_dense,
        "dense",
        windows=windows or random_windows(),
        settings=chosen,
        folder=folder,
        origin="0" * 64,
        arithmetic=Arithmetic.here(chosen.precision, save_memory=save_memory),
        batch=BatchSize(4),
        micro_batch=BatchSize(2),
        max_shard_size=10**9,
        matching=matching(pair[0], chosen.hidden_states) if chosen.hidden_states else None,
        end=end,
    )


def random_windows(steps: int = 6) -> RecoveryWindows:
    """Return random windows of two sources, for so many steps of four windows."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, VOCABULARY, (WINDOWS + 2 * HELD_OUT, LENGTH), generator=generator)
    return RecoveryWindows(
        train_NL=drawn[2 * HELD_OUT :],
        train_sources_N=torch.arange(WINDOWS) % 2,
        order_M=torch.arange(4 * steps) % WINDOWS,
        held_out_NL=drawn[: 2 * HELD_OUT],
        held_out_sources_N=torch.arange(2 * HELD_OUT) % 2,
        names=("web", "code"),
        begin=(),
        notes=(),
    )
