"""Training of all weights of a kept layer, after its closed-form repairs, towards the dense hidden states.

The layer gets the pruned hidden states that it will really get, and its output is led towards the dense hidden states
after the layer and its gap. The loss is

    mean over tokens   ‖ output − dense ‖² / ‖ dense ‖²

so that all tokens weigh equally: in most models the first of a window has hidden states that are a hundred times as
long as others. A metric of the hidden states from the gradients of the loss changed nothing in SmolLM2's layer 20. Adam
trains norms, token mixer and MLP together (``layer_trainer``), on a few windows a step. After every epoch the windows
that are held out judge the weights. The best are kept; an epoch that is not better is undone and followed by smaller
steps; where none is better than the closed form, that is kept.

It needs the memory of one layer, of its gradients and moments in float32, and of the activations of one window.

Shapes: L sequence length, D hidden size, S windows of a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmprune.common.distributed import all_agree, sum_over_processes
from llmprune.layerwise.cached_forward import CachedForward
from llmprune.layerwise.decoder import Tensors
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.records import BlockRecord
from llmprune.prune.repair.base import Stage
from llmprune.prune.repair.layer_trainer import LayerTrainer, add_gradients, cloned
from llmprune.prune.repair.training_windows import LayerWindows, TrainingWindows
from llmprune.recipe.refit import EPOCHS

_LEAST = 1e-30  # of what is divided by
_SETBACKS = 2  # epochs without a better result, each followed by smaller steps; a third ends the training


class BlockTraining:
    """Training of the whole layer, where ``refit.block`` is set."""

    stage = Stage.AFTER_GAP

    def apply(self, run: Pass2Context, work: LayerWork) -> None:
        """Train the layer; keep the weights of the best epoch, or those of the closed form."""
        if run.training is None:
            return
        tensors = cloned(work.weights.cut)
        with run.pruned.decoder.layer(work.step.new, tensors) as layer:
            training = _Training(run, work.step.new, windows=run.training, layer=layer, tensors=tensors)
            work.outcome.block = training.train(work.weights.cut)
        if training.best is not None:
            work.weights.cut = training.best
            work.runs = CachedForward(run.pruned, {})  # what was stored belongs to the closed form


class _Training:
    """Layer ``index`` of the pruned model under training; its weights are those in ``tensors``, trained in place.

    ``best``: the tensors of the best epoch; None while none is better than the closed form.
    """

    def __init__(
        self, run: Pass2Context, index: int, *, windows: TrainingWindows, layer: nn.Module, tensors: Tensors
    ) -> None:
        self.run, self.index, self.windows, self.layer, self.tensors = run, index, windows, layer, tensors
        self.device = run.pruned.decoder.device_of(index)
        self.best: Tensors | None = None

    def train(self, closed_form: Tensors) -> BlockRecord:
        """Train until the schedule ends, or smaller steps than before do not help either."""
        own = self.windows.of_layer(self.index)
        before = least = self._held_out_error(own)
        if before == 0:
            return BlockRecord(before, before, 0)
        trainer = LayerTrainer(self.layer, steps=EPOCHS * own.steps_of_epoch)
        best_epoch = setbacks = 0
        for epoch in range(1, EPOCHS + 1):
            for windows_S in own.steps():
                losses = (self._error(window) * share for window, share in own.shares(windows_S))
                if not all_agree(add_gradients(losses)):
                    return BlockRecord(before, before, None)
                trainer.step()
            error = self._held_out_error(own)
            if error < least:
                least, best_epoch, self.best = error, epoch, cloned(self.tensors)
            elif setbacks == _SETBACKS:
                break
            else:
                setbacks += 1
                trainer.go_back(self.best or closed_form)
        return BlockRecord(before, least, best_epoch * own.steps_of_epoch)

    def _error(self, window: int) -> Tensor:
        """Return the mean over the tokens of a window of the squared relative error of the layer's output."""
        windows, device = self.windows, self.device
        hidden_1LD = windows.hidden_states(self.run.pruned.hidden_states, window, device=device)
        dense_1LD = windows.hidden_states(self.run.dense.hidden_states, window, device=device).float()
        # a copy: a layer may change its input in place
        output_1LD = windows.call(window, self.index).run(self.layer, hidden_1LD.clone()).float()
        lengths_1L = dense_1LD.square().sum(-1).clamp_min(_LEAST)
        return ((output_1LD - dense_1LD).square().sum(-1) / lengths_1L).mean()

    @torch.no_grad()
    def _held_out_error(self, own: LayerWindows) -> float:
        """Return the root of the mean over held-out tokens of the squared relative error."""
        error = torch.zeros(1, dtype=torch.float64)
        for window, share in own.shares(own.held_out_S):
            error += float(self._error(window)) * share
        sum_over_processes([error])
        return math.sqrt(float(error))
