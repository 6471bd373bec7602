"""Shape of a pruned model: the number of units of every kind, without a choice which of them they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Numbers of layers, neurons, key-value groups and experts that a pruned model keeps.

    ``widths``: neurons of each config field that sets a width, sorted by field; all of them, cut or not. ``kv_groups``,
    ``experts``: in each layer; None where the model has none that are counted. ``tokens``: of the vocabulary; None if
    all are kept.
    """

    layers: int
    widths: tuple[tuple[str, int], ...] = ()
    kv_groups: int | None = None
    experts: int | None = None
    tokens: int | None = None

    @property
    def neurons(self) -> dict[str, int]:
        """Neurons by config field."""
        return dict(self.widths)

    @property
    def name(self) -> str:
        """Name in tables and figures, such as ``26 layers, 1280 neurons, 2 groups``; all shapes of a search have the
        same tokens, which it leaves out.
        """
        parts = [_counted(self.layers, "layer")]
        if self.widths:
            parts.append("/".join(str(width) for _, width in self.widths) + " neurons")
        if self.kv_groups is not None:
            parts.append(_counted(self.kv_groups, "group"))
        if self.experts is not None:
            parts.append(_counted(self.experts, "expert"))
        return ", ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
