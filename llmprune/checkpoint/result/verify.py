"""Verify that the saved checkpoint is the model that the run computed: load it in a fresh process and compare.

Shapes in names: B batch, L sequence length, P probed positions, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from llmprune.anatomy.meta_model import auto_class
from llmprune.common.distributed import environment_of_one
from llmprune.common.errors import VerificationError
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.layer_calls import takes_positions
from llmprune.layerwise.logits import token_chunks

logger = logging.getLogger(__name__)

# Largest accepted difference of logits, relative to the largest logit. The same code on the same device gives 0; other
# kernels (of a GPU, or of a layer that was split over devices) round differently.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_WORKER = Path(__file__).with_name("verify_worker.py")
_PROBED_POSITIONS = 16
_RAISED = re.compile(r"[\w.]+(Error|Exception|Interrupt)\b")  # first line of an error below a traceback
_INPUT = "inputs."  # before the names of the model's other inputs, as the worker reads them
_OF_GPU = re.compile(r"OutOfMemoryError|\b(CUDA|HIP) error|NVIDIA driver|(CU|HIP|ROC)\w+_STATUS_\w+")


@dataclass(frozen=True)
class Probe:
    """Tokens, and the logits of the run's final model at some of their positions.

    ``inputs``: the other arguments of the model's forward, such as pixels; empty where the windows hold no image.
    """

    ids_BL: Tensor
    positions_P: Tensor
    logits_BPV: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def take(cls, forward: LayerwiseForward) -> Probe:
        """Take the first batch of a layer-wise forward pass that has passed the last layer; of images one window.

        Logits are computed at the probed positions only. For a model that computes them at all positions, only as
        many windows are taken as have ``MAX_LOGITS`` logits, at least one.
        """
        inputs = {}
        ids_BL, hidden_BLD = forward.batches[0], forward.hidden_states[0]
        if forward.decoder.images is not None:
            inputs = forward.decoder.images.model_inputs(ids_BL[:1])
            ids_BL, hidden_BLD = inputs.pop("input_ids"), hidden_BLD[:1]
        length, skeleton = ids_BL.shape[1], forward.decoder.skeleton
        positions_P = torch.linspace(0, length - 1, min(_PROBED_POSITIONS, length)).long()
        with torch.no_grad():
            if takes_positions(skeleton):
                logits_BPV = forward.logits_of(ids_BL, hidden_BLD, positions_P=positions_P)
            else:
                chunk = next(token_chunks(forward, ids_BL))
                logits_BPV = chunk.logits(forward, ids_BL, hidden_BLD=hidden_BLD)[:, positions_P]
                ids_BL = ids_BL[chunk.windows]
        return cls(ids_BL, positions_P, logits_BPV.float().cpu(), inputs)


@dataclass(frozen=True)
class SparseCounts:
    """Totals over the saved sparse matrices. ``violations``: groups that break the pattern."""

    matrices: int
    weights: int
    zeros: int
    groups: int
    violations: int


@dataclass(frozen=True)
class SparseClaim:
    """The sparsity that the saved model must have.

    ``matrices``: (full name, True if stored [inputs, outputs]); of every group of ``of`` inputs at most ``kept`` are
    not zero; without groups (``of`` None) at least ``zeros`` of all ``weights`` are zero.
    """

    matrices: tuple[tuple[str, bool], ...] = ()
    weights: int = 0
    kept: int = 0
    of: int | None = None
    zeros: int = 0

    def counted(self, counts: list[list[int]]) -> SparseCounts | None:
        """Sum the counts (zeros, groups, violating groups) of each matrix; None without sparse matrices."""
        if not self.matrices:
            return None
        zeros, groups, violations = (sum(column) for column in zip(*counts, strict=True))
        return SparseCounts(len(self.matrices), self.weights, zeros, groups, violations)

    def problem(self, counts: list[list[int]]) -> str | None:
        """Return a sentence where the counts (zeros, groups, violating groups) of each matrix break the claim."""
        broken = [(name, each[2]) for (name, _), each in zip(self.matrices, counts, strict=True) if each[2]]
        if broken:
            listed = ", ".join(f"{name} ({number} groups)" for name, number in broken[:3])
            return f"{len(broken)} matrices break the pattern {self.kept}:{self.of}: {listed}"
        zeros = sum(each[0] for each in counts)
        if zeros < self.zeros:
            return f"{zeros:,} weights of its sparse matrices are zero and the recipe asks for {self.zeros:,}"
        return None


@dataclass(frozen=True)
class Loading:
    """Options of the fresh process.

    ``device_map``: device of each module by path; None: all are on the CPU. ``on_cpu``: the same without GPUs, where
    these cannot be used.
    """

    device_map: Mapping[str, int | str] | None = None
    trust_remote_code: bool = False
    on_cpu: Mapping[str, int | str] | None = None

    @property
    def uses_gpu(self) -> bool:
        """True where the device map names a GPU."""
        return bool({*(self.device_map or {}).values()} - {"cpu", "disk"})


@dataclass(frozen=True)
class Verified:
    """Measurements of the fresh process."""

    parameters: int
    largest_logit_difference: float
    cached_generation_equal: bool
    positions: int
    sparse: SparseCounts | None = None  # where matrices were made sparse

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verified:
        """Read back what ``dataclasses.asdict`` wrote to JSON."""
        sparse = values["sparse"]
        return cls(**values | {"sparse": SparseCounts(**sparse) if sparse else None})


def verify(
    checkpoint: Path,
    probe: Probe,
    *,
    parameters: int,
    dtype: torch.dtype,
    loading: Loading | None = None,
    claim: SparseClaim | None = None,
) -> Verified:
    """Load a checkpoint with a plain ``from_pretrained`` in a fresh process and compare it with the run.

    ``parameters``: the plan's count; ``dtype``: of the computation; ``loading``: None for plain loading to the CPU;
    ``claim``: None for a dense model. The caller has freed the devices that the process needs. Raises
    VerificationError for missing or unexpected tensors, other logits, a broken key-value cache, another parameter
    count, or a sparse matrix that breaks the pattern. Where a GPU is too full for a single window, or takes no second
    process, the process is started again on the CPU.
    """
    claim = claim or SparseClaim()
    tolerance = TOLERANCE.get(dtype, 1e-4)
    loading = loading or Loading()
    try:
        found = _ask_worker(checkpoint, probe, loading=loading, claim=claim, tolerance=tolerance)
    except _GpuRefused as error:
        logger.warning("verification: %s; it is repeated on the CPU", error)
        loading = replace(loading, device_map=loading.on_cpu)
        found = _ask_worker(checkpoint, probe, loading=loading, claim=claim, tolerance=tolerance)
    problems = _problems(found, parameters=parameters, tolerance=tolerance, claim=claim)
    if problems:
        raise VerificationError(
            f"the saved model was loaded in a fresh process and refused: {'; '.join(problems)}. "
            f"It is left in {checkpoint} for inspection and is not published"
        )
    return Verified(
        found["parameters"],
        found["difference"],
        found["cached_generation_equal"],
        probe.logits_BPV.shape[:2].numel(),
        claim.counted(found["sparse"]),
    )


def _problems(found: dict[str, Any], *, parameters: int, tolerance: float, claim: SparseClaim) -> list[str]:
    """Return a sentence for everything in which the checkpoint differs from the run."""
    problems = []
    if found["keys"]:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}" for kind, keys in found["keys"].items())
        problems.append(f"the checkpoint's tensors do not fit its config ({listed})")
    limit = tolerance * max(found["scale"], 1.0)
    if not found["difference"] <= limit:
        problems.append(f"its logits differ by {found['difference']:.3g} from the run's (limit {limit:.3g})")
    if not found["cached_generation_equal"]:
        problems.append("generation with the key-value cache differs from generation without")
    if found["parameters"] != parameters:
        problems.append(f"it has {found['parameters']:,} parameters and the plan has {parameters:,}")
    if broken := claim.problem(found["sparse"]):
        problems.append(broken)
    return problems


class _GpuRefused(Exception):  # not an error for people
    """The fresh process could not use a GPU."""


def _message(stderr: str) -> str:
    """Return the first line of the error that ended a process: CUDA's errors have several; else its last line."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if _RAISED.match(line)), lines[-1])


def _ask_worker(
    checkpoint: Path, probe: Probe, *, loading: Loading, claim: SparseClaim, tolerance: float
) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=loading.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=checkpoint.parent) as name:
        folder = Path(name)
        tensors = {"ids": probe.ids_BL, "positions": probe.positions_P, "logits": probe.logits_BPV}
        tensors |= {f"{_INPUT}{name}": value for name, value in probe.inputs.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "probe.safetensors")
        job = {
            "checkpoint": str(checkpoint),
            "auto_class": auto_class(config).__name__,
            "trust_remote_code": loading.trust_remote_code,
            "device_map": None if loading.device_map is None else dict(loading.device_map),
            "offload_folder": str(folder / "offload"),
            "probe": str(folder / "probe.safetensors"),
            "matrices": claim.matrices,
            "pattern": claim.of and [claim.kept, claim.of],
            "tolerance": tolerance,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-P", str(_WORKER), str(folder / "job.json")]
        hidden = {} if loading.uses_gpu else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_of_one() | hidden)
    if done.returncode != 0:
        message = _message(done.stderr)
        if loading.uses_gpu and _OF_GPU.search(message):
            raise _GpuRefused(message)
        raise VerificationError(
            f"plain transformers cannot load the saved model in {checkpoint}: {message} (exit code {done.returncode})"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert not found["llmprune_imported"], "the fresh process imports no llmprune"
    return found
