"""Put the products of a run together into its report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from torch import Tensor

from llmprune.anatomy.value import Anatomy
from llmprune.cut import Cut, kept_share
from llmprune.model.processes import count
from llmprune.report.value import LayerFigures, Provenance
from llmprune.scores import Scores, unit_key

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "safetensors", "huggingface_hub")


def layer_figures(
    anatomy: Anatomy, scores: Scores | None, cut: Cut, errors: Mapping[int, tuple[float, float | None]]
) -> tuple[LayerFigures, ...]:
    """One row for every layer of the dense model. ``errors``: cut and refit error by kept layer."""
    return tuple(_layer(index, anatomy, scores, cut, errors.get(index)) for index in range(cut.num_layers))


def _layer(
    index: int, anatomy: Anatomy, scores: Scores | None, cut: Cut, error: tuple[float, float | None] | None
) -> LayerFigures:
    removed = index in cut.removed
    unit = anatomy.units[index][0] if anatomy.units[index] else None
    key = unit_key(index, unit.path) if unit else ""
    keep_K: Tensor | None = cut.neurons.get(key)
    known = scores.neurons.get(key) if scores else None
    kept = None if unit is None else unit.width if keep_K is None else len(keep_K)
    return LayerFigures(
        layer=index,
        importance=float(scores.layers[index]) if scores and scores.layers is not None else None,
        removed=removed,
        width=unit.width if unit else None,
        kept=None if removed else kept,
        score_share=kept_share(known, keep_K) if known is not None and keep_K is not None and not removed else None,
        error_cut=error[0] if error else None,
        error_refit=error[1] if error else None,
    )


def provenance(
    model: str,
    revision: str | None,
    commit: str | None,
    calibration: tuple[str, int],
    seed: int,
    trust_remote_code: bool,
    device: str,
) -> Provenance:
    """What the result came from. ``calibration``: fingerprint and number of the tokens."""
    return Provenance(
        model=model,
        revision=revision,
        commit=commit,
        calibration_fingerprint=calibration[0],
        calibration_tokens=calibration[1],
        seed=seed,
        trust_remote_code=trust_remote_code,
        device=device,
        processes=count(),
        versions=versions(),
    )


def versions(libraries: Sequence[str] = _LIBRARIES) -> dict[str, str]:
    """Versions of llmprune, Python and the libraries that compute."""
    from llmprune import __version__

    return {"llmprune": __version__, "python": platform.python_version()} | {name: version(name) for name in libraries}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
