"""Results that depend on a config alone, kept for the next model with the same: a run and a service plan one often."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from llmprune.anatomy.meta_model import Config

T = TypeVar("T")


class KeptResults(Generic[T]):
    """Results by key, of which the oldest is forgotten where there are more than ``most``."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._results: dict[Hashable, T] = {}

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the result of a key, which is computed once. An error is not kept."""
        try:
            return self._results[key]
        except KeyError:
            result = compute()
        while len(self._results) >= self._most:
            self._results.pop(next(iter(self._results)), None)
        self._results[key] = result
        return result


def config_key(config: Config) -> Hashable:
    """Return the class and the values of a config, without the folder or name that it was read from."""
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return type(config), json.dumps(values, sort_keys=True)
