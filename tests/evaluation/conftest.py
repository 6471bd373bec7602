"""Fixtures of the evaluation tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.lm_eval_tasks import word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer without a padding token."""
    return word_tokenizer()


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index only the include folder: lm-eval's own 14,000 task files take 13 s."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager

    def without_defaults(**options: Any) -> Any:
        return manager(**options | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_defaults)
