"""Statistics: McNemar's test, samples needed, coverage of the bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from llmprune.evaluation.statistics import interval, mcnemar, mean_draws, ratio_draws, samples_needed


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375), (0, 1, 1.0)])
def test_mcnemar_is_exact(lost: int, gained: int, p: float) -> None:
    """The two-sided binomial probability of flips at least this uneven: (5, 0) is 2 / 2^5."""
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_samples_needed_has_limits() -> None:
    """A nearer bar needs more samples; None if it equals the point or the number is infeasible."""
    near, far = (samples_needed(100, 0.95, edge=0.9, bar=bar, confidence=0.95) for bar in (0.94, 0.91))
    assert near is not None
    assert far is not None
    assert near > far > 100
    assert samples_needed(100, 0.95, edge=0.9, bar=0.95, confidence=0.95) is None
    assert samples_needed(100, 0.95, edge=0.9, bar=0.95 - 1e-9, confidence=0.95) is None


def _cells(accuracy: float, retention: float, correlation: float) -> NDArray[np.float64]:
    """Return the probabilities that both, only dense, only pruned, and neither are right."""
    other = accuracy * retention
    spread = correlation * (accuracy * (1 - accuracy) * other * (1 - other)) ** 0.5
    both = min(accuracy * other + spread, other)
    return np.array([both, accuracy - both, other - both, 1 - accuracy - other + both])


def _values(counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return dense and pruned values with these counts of the four cells."""
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


@pytest.mark.parametrize(
    ("samples", "accuracy", "retention", "correlation"),
    [(100, 0.5, 0.95, 0.7), (300, 0.8, 0.9, 0.8), (1000, 0.3, 0.99, 0.5)],
)
def test_intervals_cover_the_truth(samples: int, accuracy: float, retention: float, correlation: float) -> None:
    """For 1,000 draws with known accuracies, 93 to 97 % of the 95 % intervals contain the true ratio."""
    generator = np.random.default_rng(samples)
    drawn = generator.multinomial(samples, _cells(accuracy, retention, correlation), size=1000)
    covered = 0
    for place, counts in enumerate(drawn):
        dense_N, pruned_N = _values(counts)
        ratio = pruned_N.mean() / dense_N.mean()
        low, high = interval(ratio_draws(dense_N, pruned_N, name=f"{place}", draws=500), ratio, confidence=0.95)
        covered += low <= retention <= high
    assert 930 <= covered <= 970


def test_intervals_of_the_mean_cover_the_truth() -> None:
    """The mean over three tasks of different size and difficulty has the same coverage."""
    tasks = ((200, 0.4, 0.95, 0.7), (500, 0.7, 0.9, 0.8), (100, 0.9, 0.98, 0.6))
    truth = float(np.mean([retention for _, _, retention, _ in tasks]))
    generator = np.random.default_rng(7)
    drawn = [generator.multinomial(size, _cells(*rest), size=1000) for size, *rest in tasks]
    covered = 0
    for place in range(1000):
        pairs = {f"{task}-{place}": _values(counts[place]) for task, counts in enumerate(drawn)}
        point = float(np.mean([pruned_N.mean() / dense_N.mean() for dense_N, pruned_N in pairs.values()]))
        draws = {name: ratio_draws(*pair, name=name, draws=250) for name, pair in pairs.items()}
        low, high = interval(mean_draws(draws), point, confidence=0.95)
        covered += low <= truth <= high
    assert 930 <= covered <= 970
