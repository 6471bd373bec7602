"""Round MLP widths to multiples that matrix kernels run fast at, and that quantisers take."""

from __future__ import annotations

from llmprune.recipe.width import Multiple

K_QUANT_ROW = 256  # weights of a super-block of llama.cpp's k-quants, which a row has a whole number of
_FEWEST_STEPS = 8


def round_width(wanted: float, width: int, *, multiple: Multiple = "auto") -> int:
    """Return the multiple of the step nearest to ``wanted`` neurons: at least one step, at most ``width``."""
    step = width_step(width, multiple)
    return min(max(round(wanted / step), 1) * step, width)


def width_step(width: int, multiple: Multiple = "auto") -> int:
    """Return ``multiple``; for ``auto`` 256, 128, or the largest power of two that divides the width.

    256 where it divides a width of at least 2,048: such rows keep llama.cpp's k-quants (blocks of 256), FP8 blocks of
    128 over two GPUs, and tensor cores. In a smaller width a step of 256 is more than an eighth, so that rounding would
    move the width by more than a sixteenth from what the recipe asks.
    """
    if multiple != "auto":
        return multiple
    coarse = width % K_QUANT_ROW == 0 and width >= _FEWEST_STEPS * K_QUANT_ROW
    return K_QUANT_ROW if coarse else min(width & -width, K_QUANT_ROW // 2)
