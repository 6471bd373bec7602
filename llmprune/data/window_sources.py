"""Sources of calibration windows: their shares, their order and their names.

Shapes in names: N windows, L sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from llmprune.common.errors import CalibrationError
from llmprune.recipe.calibration import Calibration, TokenWindows
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor

_TELLING = ("config", "split", "revision", "text_field", "messages_field")
SELF_GENERATED = "self_generated"  # name of the source of windows that the dense model wrote itself


def sources_of_windows(windows: Calibration) -> Tensor | None:
    """Return the index in ``source_names`` of the source of each calibration window, int64 [N].

    The windows are those of ``load_windows`` and ``with_generated``. None where they have no known sources: for ready
    tokens without a readable ``source_key``.
    """
    import torch

    sources, stored = windows.text_sources(), windows.stored_sources()
    samples = windows.read_shape()[0]
    if sources:
        counts = torch.tensor(share_by_weight(samples, sources))
        read_N = torch.arange(len(sources)).repeat_interleave(counts)[order_of(samples, windows.seed)]
    elif stored is not None:
        read_N = torch.unique(torch.tensor(stored[:samples]), return_inverse=True)[1]
    elif windows.generated:
        read_N = torch.zeros(samples, dtype=torch.int64)
    else:
        return None
    own_N = torch.full((windows.generated,), int(read_N.max()) + 1)
    return with_generated(read_N, own_N, seed=windows.seed)


def generated_windows(windows: Calibration) -> Tensor | None:
    """Return True for each window that the dense model writes itself, bool [N]; None where it writes none."""
    import torch

    if not windows.generated:
        return None
    read_N = torch.zeros(windows.read_shape()[0], dtype=torch.bool)
    return with_generated(read_N, torch.ones(windows.generated, dtype=torch.bool), seed=windows.seed)


def source_names(windows: Calibration) -> tuple[str, ...]:
    """Return the names of the sources: of text as the recipe names it, of ready tokens their numbers, such as 0, 1.

    Names are distinct: sources of one data set, or of one name, get what they differ in too, as ``wiki (config de)``
    and ``wiki (config fr)``, and a number where that is not enough.
    """
    stored = windows.stored_sources()
    numbers = sorted(set((stored or [])[: windows.read_shape()[0]]))
    names = distinct_names(windows.text_sources()) or [str(number) for number in numbers]
    names = names or [str(windows.tokens)]
    return (*names, SELF_GENERATED) if windows.generated else tuple(names)


def distinct_names(sources: Sequence[TextSource]) -> list[str]:
    """Return a name for each source, the recipe's where these differ."""
    names = [source.name or source.dataset for source in sources]
    alike = [[other for other, same in zip(sources, names, strict=True) if same == name] for name in names]
    told = [
        f"{name} ({details})" if (details := _differences(source, group)) else name
        for source, name, group in zip(sources, names, alike, strict=True)
    ]
    return [f"{name} (number {place})" if told.count(name) > 1 else name for place, name in enumerate(told, start=1)]


def _differences(source: TextSource, group: Sequence[TextSource]) -> str:
    """Return the keys of a source that tell it from the others of its name, with their values."""
    told = [key for key in _TELLING if len({getattr(other, key) for other in group}) > 1]
    return ", ".join(f"{key} {getattr(source, key)}" for key in told if getattr(source, key) is not None)


def with_generated(read_N: Tensor, generated_N: Tensor, *, seed: int) -> Tensor:
    """Return what was read and what the model generated in one shuffled order; unchanged where it generated nothing.

    Both are windows [N, L], or another value for each window [N].
    """
    import torch

    if not len(generated_N):
        return read_N
    return torch.cat([read_N, generated_N])[order_of(len(read_N) + len(generated_N), seed)]


def order_of(samples: int, seed: int) -> Tensor:
    """Return the shuffled order of windows, int64 [samples]."""
    import torch

    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))


def require_shares(windows: TokenWindows, samples: int) -> None:
    """Raise CalibrationError where a source would get none of ``samples`` windows that are read."""
    if windows.text_sources():
        share_by_weight(samples, windows.text_sources())


def share_by_weight(samples: int, sources: Sequence[TextSource]) -> list[int]:
    """Split a number of windows by weight, the largest remainders rounded up.

    Raises CalibrationError where a source would get none.
    """
    counts = shares(samples, [source.weight for source in sources])
    left_out = [source.name or source.dataset for source, count in zip(sources, counts, strict=True) if not count]
    if left_out:
        needed = ceil(sum(source.weight for source in sources) / min(source.weight for source in sources))
        raise CalibrationError(
            f"{', '.join(left_out)} would get none of the {samples} samples; "
            f"ask for more samples ({needed} give each source one), raise its weight, or remove it from sources"
        )
    return counts


def shares(number: int, weights: Sequence[float]) -> list[int]:
    """Split a number in proportion to weights, the largest remainders rounded up."""
    total = sum(weights)
    exact = [number * weight / total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: number - sum(counts)]:
        counts[index] += 1
    return counts
