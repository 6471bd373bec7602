"""Round MLP widths to multiples that matrix kernels run fast at."""

from __future__ import annotations


def round_width(wanted: float, width: int, *, multiple: int | None = None) -> int:
    """Return the multiple of the step nearest to ``wanted`` neurons: at least one step, at most ``width``."""
    step = width_step(width, multiple)
    return min(max(round(wanted / step), 1) * step, width)


def width_step(width: int, multiple: int | None = None) -> int:
    """Return ``multiple``; without it 128, or the largest power of two that divides the width where that is less."""
    return multiple or min(width & -width, 128)
