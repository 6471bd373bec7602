"""Size of the dense or the pruned model."""

from __future__ import annotations

from llmprune.results.figures.base import Figures


class Size(Figures):
    """Size of a model."""

    parameters: int
    bytes: int  # of the weights, in the dtype that they are saved in
    layers: int
    widths: dict[str, int]  # neurons of an MLP, by the config field that sets it; empty if none was found
    experts: int | None  # in each mixture; None without mixtures
    kv_groups: int | None = None  # key-value groups of each layer; None if the config does not count them
    hidden: int | None = None  # channels of the residual stream
    vocabulary: int | None = None  # tokens; None where the run cuts none
    kv_bytes_per_token: int | None  # key-value cache of one token; None if unknown
