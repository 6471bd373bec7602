"""lm-eval's interface to a loaded model, with smaller batches where a device runs out of memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from llmprune.common.devices import input_device
from llmprune.common.distributed import rank, shared_accelerator, world_size
from llmprune.common.out_of_memory import BatchSize

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelInMemory(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """Loaded model; with several processes each evaluates its share of the samples.

    The longest requests come first, so memory runs out at the beginning of a task. A smaller batch is kept for all
    later requests. Other processes are not involved: they wait where the task ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        side: str,
        reductions: list[str],
    ) -> None:
        # HFLM adds a padding token to the tokenizer, which must not be saved with the checkpoint.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._side, self._batch = side, BatchSize(batch_size, "requests", alone=True, reductions=reductions)
        self._device = input_device(model)  # HFLM would move the inputs of an offloaded model to "meta"
        if world_size() > 1:  # for a loaded model, HFLM leaves the distribution to its caller
            self.accelerator, self._rank, self._world_size = shared_accelerator(), rank(), world_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, which their GPUs exchange also where this model has no part on one."""
        gathered: Tensor = super().all_gather(tensor.to(self.accelerator.device))
        return gathered

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(lambda: super(ModelInMemory, self)._loglikelihood_tokens(*args, **kwargs))

    def generate_until(self, *args: Any, **kwargs: Any) -> Any:
        """Generate the answers to all requests."""
        return self._run(lambda: super(ModelInMemory, self).generate_until(*args, **kwargs))

    def _run(self, work: Any) -> Any:
        def with_batches_of(batch_size: int) -> Any:
            self.batch_size_per_gpu = batch_size
            return work()

        return self._batch.run(f"evaluation of the {self._side} model's tasks", with_batches_of)
