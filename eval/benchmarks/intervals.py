"""Coverage of the confidence intervals of a retention, in simulations with a known true value.

    python eval/benchmarks/intervals.py [--draws 1000]

For every number of documents, accuracy of the dense model, retention, and correlation between both models' answers,
documents are drawn and the 95 % interval of ``llmprune.evaluation.statistics`` is held against the truth. The plain
percentile bootstrap and the delta method on the log ratio stand beside it. Figures go to results/intervals.json.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import numpy as np
from common import record
from numpy.typing import NDArray

from llmprune.evaluation.statistics import interval, ratio_draws

SAMPLES = (50, 100, 200, 500, 2000)
ACCURACIES, RETENTIONS, CORRELATIONS = (0.3, 0.5, 0.8, 0.95), (0.8, 0.95, 0.99), (0.3, 0.7, 0.9)
BOOTSTRAP = 1000

Cells = NDArray[np.float64]  # both right, only dense, only pruned, neither


def chances(accuracy: float, retention: float, correlation: float) -> Cells:
    """Probabilities of the four outcomes of a document."""
    other = accuracy * retention
    both = min(accuracy * other + correlation * (accuracy * (1 - accuracy) * other * (1 - other)) ** 0.5, other)
    found = np.array([both, accuracy - both, other - both, 1 - accuracy - other + both]).clip(0)
    shares: Cells = found / found.sum()
    return shares


def intervals(counts: NDArray[np.int64], seed: int) -> Iterator[tuple[str, float, float]]:
    """Each method's interval for these counts."""
    dense_N, pruned_N = np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)
    ratio = float(pruned_N.mean() / dense_N.mean())
    yield "llmprune", *interval(ratio_draws(dense_N, pruned_N, name=str(seed), draws=BOOTSTRAP), ratio, confidence=0.95)
    total = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=BOOTSTRAP)
    ratios = (drawn[:, 0] + drawn[:, 2]) / np.maximum(drawn[:, 0] + drawn[:, 1], 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    yield "plain percentile", float(low), float(high)
    spread = np.std(pruned_N / pruned_N.mean() - dense_N / dense_N.mean(), ddof=1) / total**0.5
    yield "delta, log ratio", float(ratio * np.exp(-1.96 * spread)), float(ratio * np.exp(1.96 * spread))


def main() -> None:
    """Every combination, then the mean and the worst of each number of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for samples, *truth in itertools.product(SAMPLES, ACCURACIES, RETENTIONS, CORRELATIONS):
        cells = chances(*truth)
        wanted = (cells[0] + cells[2]) / (cells[0] + cells[1])
        held: dict[str, int] = {}
        for seed, counts in enumerate(generator.multinomial(samples, cells, size=draws)):
            for name, low, high in intervals(counts, seed):
                held[name] = held.get(name, 0) + (low <= wanted <= high)
        flips = round(float(samples * (cells[1] + cells[2])), 1)
        rows.append({"samples": samples, "truth": truth, "flips": flips} | {k: v / draws for k, v in held.items()})
    names = [name for name in rows[0] if name not in ("samples", "truth", "flips")]
    summary = {
        f"{samples} documents": {
            name: {"mean": round(fmean(of), 4), "least": min(of), "most": max(of)}
            for name in names
            if (of := [row[name] for row in rows if row["samples"] == samples])
        }
        for samples in SAMPLES
    }
    record("intervals", {"draws": draws, "summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
