"""Search for models on the hub, asked by the service: browsers load nothing from another host.

Each search has a time limit; answers are cached, and a hub that does not answer is left alone for a while. The search
uses the operator's token only where jobs do (``serve --lend-hub-token``), for private models are in its answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llmprune.service.api.access.rate_limit import RateLimit

logger = logging.getLogger(__name__)

MAX_MODELS = 12
MAX_QUERY = 96  # letters, as many as an id has
TIME_LIMIT = 6.0  # seconds of one search
_CACHED = 256  # searches
_FRESH = 300.0  # seconds in which an answer is used again
_LEFT_ALONE = 30.0  # seconds after a failure
_AT_ONCE = 2  # searches of all users
_PATIENCE = 1.0  # seconds that a search waits for its turn, in a thread of the server
_PARAMETERS: dict[str, Any] = {
    "pipeline_tag": "text-generation",
    "sort": "downloads",
    "limit": MAX_MODELS,
    "expand": ["safetensors", "gated"],
}
OFFLINE = "This service has no access to the hub (HF_HUB_OFFLINE is set). Models on this machine can be chosen."
UNREACHABLE = (
    "The hub does not answer this service, so it cannot be searched now. Models on this machine can be chosen, and "
    "the id of a model can be typed below."
)
TOO_MANY = "Too many searches; wait some seconds."


@dataclass(frozen=True)
class HubModel:
    """A model on the hub. ``parameters``: None where unknown; ``gated``: its licence has to be accepted."""

    id: str
    parameters: int | None
    gated: bool


@dataclass(frozen=True)
class HubAnswer:
    """Models that were found, the most downloaded first, or the reason why none can be."""

    models: tuple[HubModel, ...] = ()
    problem: str | None = None


class HubSearch:
    """Searches for all users, ``_AT_ONCE`` at a time."""

    def __init__(self, *, lend_token: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._lends_token = lend_token
        self._clock = clock
        self._rate = RateLimit(1.0, 20)
        self._answers: OrderedDict[str, tuple[float, HubAnswer]] = OrderedDict()
        self._failed = float("-inf")
        self._lock = threading.Lock()
        self._workers = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hub-search")
        self._free = threading.Semaphore(_AT_ONCE)

    def find(self, text: str, *, caller: str) -> HubAnswer:
        """Return the text-generation models whose id has ``text``."""
        query = " ".join(text.split())[:MAX_QUERY].lower()
        if not query:
            return HubAnswer()
        if _is_offline():
            return HubAnswer(problem=OFFLINE)
        with self._lock:
            made, answer = self._answers.get(query, (float("-inf"), HubAnswer()))
            if self._clock() - made < _FRESH:
                return answer
            if self._clock() - self._failed < _LEFT_ALONE:
                return HubAnswer(problem=UNREACHABLE)
        if self._rate.wait(caller) or not self._free.acquire(timeout=_PATIENCE):
            return HubAnswer(problem=TOO_MANY)
        return self._asked(query)

    def _asked(self, query: str) -> HubAnswer:
        """Ask the hub and store the answer. The worker gives its place back, however late it ends."""
        asked = self._workers.submit(self._ask, query)
        try:
            answer = HubAnswer(asked.result(TIME_LIMIT))
        except Exception as error:  # too slow, or an error of one of the client's libraries
            logger.warning("the search on the hub failed: %s: %s", type(error).__name__, error)
            with self._lock:
                self._failed = self._clock()
            return HubAnswer(problem=UNREACHABLE)
        with self._lock:
            self._answers[query] = self._clock(), answer
            while len(self._answers) > _CACHED:
                self._answers.popitem(last=False)
        return answer

    def _ask(self, query: str) -> tuple[HubModel, ...]:
        """Ask the hub once: the client's own search has no time limit, and repeats a request that fails."""
        from huggingface_hub import ModelInfo, constants, get_session, get_token
        from huggingface_hub.utils import hf_raise_for_status

        try:
            token = get_token() if self._lends_token else None
            answer = get_session().get(
                f"{constants.ENDPOINT}/api/models",
                params=_PARAMETERS | {"search": query},
                headers={"authorization": f"Bearer {token}"} if token else {},
                timeout=TIME_LIMIT,
            )
            hf_raise_for_status(answer)
            found = [ModelInfo(**one) for one in answer.json()[:MAX_MODELS]]
            return tuple(
                HubModel(one.id, one.safetensors.total if one.safetensors else None, bool(one.gated)) for one in found
            )
        finally:
            self._free.release()


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())
