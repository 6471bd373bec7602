"""OSSCAR: neurons by combinatorial optimisation of the layer-wise least-squares error, and the weights that go with it.

With H = XᵀX + damping, P its inverse and W the down projection, the neuron with the least |W_f|² / P_ff is removed and
the rest is corrected, one neuron a step; at the end the kept columns solve the least-squares problem on the dense
weights' output. Layers are pruned in order, each on the inputs that the pruned layers before it give. Settings are the
defaults of fmchisel, its authors' package, which needs transformers below 5: a damping of 1 % of the mean diagonal.
Meng et al. 2024, https://arxiv.org/abs/2403.12983

Shapes in names: B batch, L sequence length, D hidden size, F neurons of an MLP, K kept neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peer_methods.base import BATCH, DecoderLayer, Peer, residual_writer
from peer_methods.layer_calls import layer_keywords
from peer_methods.surgery import keep_neurons_of_layer, set_width

DAMPING = 0.01


class OSSCAR(Peer):
    """Neurons and down projections by layer-wise reconstruction, sequentially."""

    removes = "neurons"

    @torch.no_grad()
    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Prune layer by layer; the stream moves on with the pruned weights."""
        keywords = layer_keywords(model, windows_NL[:1])
        stream = [model.model.embed_tokens(ids_BL) for ids_BL in torch.split(windows_NL, BATCH)]
        for layer, arguments in zip(model.model.layers, keywords, strict=True):
            neurons_BLF: list[Tensor] = []
            with layer.mlp.down_proj.register_forward_pre_hook(
                lambda _module, inputs, seen=neurons_BLF: seen.append(inputs[0])
            ):
                stream = [layer(hidden_BLD, **arguments) for hidden_BLD in stream]
            weight_DF = layer.mlp.down_proj.weight
            gram_FF = torch.zeros(weight_DF.shape[1], weight_DF.shape[1])
            for batch_BLF in neurons_BLF:
                gram_FF += batch_BLF.flatten(0, 1).T @ batch_BLF.flatten(0, 1)
            kept_K, weight_DK = reconstruct(weight_DF, gram_FF, amount)
            for hidden_BLD, batch_BLF in zip(stream, neurons_BLF, strict=True):
                hidden_BLD -= _written(layer, batch_BLF)
            keep_neurons_of_layer(layer, kept_K)
            layer.mlp.down_proj.weight = nn.Parameter(weight_DK)
            for hidden_BLD, batch_BLF in zip(stream, neurons_BLF, strict=True):
                hidden_BLD += _written(layer, batch_BLF[..., kept_K])
        set_width(model, len(kept_K))
        return []


def reconstruct(weight_DF: Tensor, gram_FF: Tensor, amount: int) -> tuple[Tensor, Tensor]:
    """Choose the kept neurons [K], ascending, and solve their columns [D, K]. ``gram_FF``: XᵀX of the inputs."""
    hessian_FF = gram_FF.double()
    hessian_FF.diagonal().add_(DAMPING * hessian_FF.diagonal().mean())
    dense_FD = weight_DF.double().T
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(hessian_FF)).float()
    rows_FD, gone_F = weight_DF.T.clone(), torch.zeros(len(gram_FF), dtype=torch.bool)
    for _ in range(amount):
        scores_F = rows_FD.square().sum(1) / inverse_FF.diagonal()
        scores_F[gone_F] = torch.inf
        neuron = scores_F.argmin()
        factor_F = inverse_FF[:, neuron] / inverse_FF[neuron, neuron]
        rows_FD.addr_(factor_F, rows_FD[neuron].clone(), alpha=-1)
        inverse_FF.addr_(factor_F, inverse_FF[neuron].clone(), alpha=-1)
        gone_F[neuron] = True
    kept_K = (~gone_F).nonzero().flatten()
    solved_KD = torch.linalg.solve(hessian_FF[kept_K[:, None], kept_K], hessian_FF[kept_K] @ dense_FD)
    return kept_K, solved_KD.T.float().contiguous()


def _written(layer: DecoderLayer, neurons_BLF: Tensor) -> Tensor:
    """Return what the MLP adds to the residual stream."""
    output_BLD: Tensor = layer.mlp.down_proj(neurons_BLF)
    writer = residual_writer(layer)
    return output_BLD if writer is layer.mlp else writer(output_BLD)
