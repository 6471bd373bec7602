"""The dense model's predictions for all windows, computed once, layer by layer, and kept on disk.

The dense model is never in memory as a whole, and not at all during the training. At each position the file holds the
log probabilities of the most likely tokens in 16 bits, those of all others together, and the loss of the token that
follows. A part that an earlier run finished is not computed again.

Shapes: N windows, n windows of a part, L sequence length, B batch, P positions of a chunk, V vocabulary, K tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.common.files import disk_errors, write_atomically
from llmprune.common.progress import track
from llmprune.data.windows import fingerprint_tokens
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.logits import token_chunks
from llmprune.recover.loss import Targets

PREDICTIONS = "recovery: dense predictions"  # in progress and in the durations of a plan
_PART = 2**18  # tokens of a part: hidden states of 2 GB in bfloat16 at a hidden size of 4,096


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of the stored predictions, and of their computation.

    ``quick``: products in bfloat16.
    """

    top_k: int
    temperature: float
    batch_size: int
    quick: bool

    def fingerprint(self, dense: str, windows_NL: Tensor) -> str:
        """Return the fingerprint of the predictions for some windows. ``dense``: that of the dense model."""
        stored = dense, self.top_k, self.temperature, self.quick, fingerprint_tokens(windows_NL)
        return hashlib.sha256(json.dumps(stored).encode()).hexdigest()


class StoredPredictions:
    """The dense model's predictions for the windows int64 [N, L], in files of a folder."""

    def __init__(self, windows_NL: Tensor, paths: list[Path]) -> None:
        self.windows_NL, self._rows = windows_NL, _rows_of_part(windows_NL)
        self._files = [safe_open(path, framework="pt") for path in paths]

    def targets(self, window: int) -> Targets:
        """Return the predictions at all positions of a window, on the CPU."""
        log_p_LK, ids_LK, log_r_L = (self._read(window, name) for name in ("log_p", "ids", "log_r"))
        return Targets(log_p_LK, ids_LK, log_r_L)

    def losses(self, window: int) -> Tensor:
        """Return the dense model's loss of each token but the first of a window, float32 [L - 1]."""
        return self._read(window, "losses")

    def _read(self, window: int, name: str) -> Tensor:
        part, row = divmod(window, self._rows)
        files: Any = self._files
        values: Tensor = files[part].get_slice(name)[row]
        return values


def store_predictions(
    dense: Decoder, windows_NL: Tensor, *, folder: Path, settings: TeacherSettings
) -> StoredPredictions:
    """Compute the predictions for the windows into ``folder``, and return them.

    Raises DiskError where the disk is full, NumericalError where the dense model returns NaN or infinity.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = torch.split(windows_NL, _rows_of_part(windows_NL))
    paths = [folder / f"part-{number:05}.safetensors" for number in range(len(parts))]
    for part_nL, path in zip(parts, paths, strict=True):
        if not _is_whole(path):
            tensors = _predictions(dense, part_nL, settings=settings)
            with disk_errors(folder):
                write_atomically(path, partial(save_file, tensors))
    return StoredPredictions(windows_NL, paths)


def _rows_of_part(windows_NL: Tensor) -> int:
    return max(_PART // windows_NL.shape[1], 1)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def _predictions(dense: Decoder, windows_nL: Tensor, *, settings: TeacherSettings) -> dict[str, Tensor]:
    """Return the tensors of a part: ``log_p`` and ``ids`` [n, L, K], ``log_r`` [n, L], ``losses`` [n, L - 1]."""
    made: dict[str, list[Tensor]] = {"log_p": [], "ids": [], "log_r": [], "losses": []}
    with torch.autocast(dense.device.type, torch.bfloat16) if settings.quick else nullcontext():
        forward = LayerwiseForward(dense, windows_nL, batch_size=settings.batch_size)
        for index in track(range(len(dense)), PREDICTIONS):
            with dense.layer(index) as layer:
                forward.pass_through(index, layer)
        dense.drop_held_and_next()
        for batch in range(len(forward.batches)):
            for key, value in _of_batch(forward, batch, settings=settings).items():
                made[key].append(value)
    return {key: torch.cat(values) for key, values in made.items()}


def _of_batch(forward: LayerwiseForward, batch: int, *, settings: TeacherSettings) -> dict[str, Tensor]:
    ids_BL = forward.token_ids(batch)
    windows, length = ids_BL.shape
    chunks = list(_of_chunks(forward, batch, ids_BL=ids_BL, settings=settings))
    top_k = chunks[0][0].ids_TK.shape[-1]
    log_p = torch.cat([targets.log_p_TK for targets, _ in chunks]).view(windows, length, top_k)
    ids = torch.cat([targets.ids_TK for targets, _ in chunks]).view(windows, length, top_k)
    log_r = torch.cat([targets.log_r_T for targets, _ in chunks]).view(windows, length)
    losses = torch.cat([losses_T for _, losses_T in chunks]).view(windows, length)[:, :-1]
    return {
        "log_p": log_p.to(torch.float16),
        "ids": ids.to(torch.int32),
        "log_r": log_r,
        "losses": losses.contiguous(),
    }


def _of_chunks(
    forward: LayerwiseForward, batch: int, *, ids_BL: Tensor, settings: TeacherSettings
) -> Iterator[tuple[Targets, Tensor]]:
    """Yield predictions and losses of chunks, flat and in the order of the tokens; a window's last token has loss 0."""
    hidden_BLD = forward.hidden_states.at(batch, forward.decoder.device)
    for chunk in token_chunks(forward, ids_BL):
        logits_BPV = chunk.logits(forward, ids_BL, hidden_BLD=hidden_BLD)
        following_BL = ids_BL[chunk.windows].roll(-1, dims=1)
        following_BL[:, -1] = -100
        losses_T = cross_entropy(
            logits_BPV.flatten(0, 1).float(), following_BL[:, chunk.positions].flatten(), reduction="none"
        )
        targets = Targets.of_logits(logits_BPV.flatten(0, 1), settings.top_k, temperature=settings.temperature)
        yield Targets(*(value.cpu() for value in targets)), losses_T.cpu()
