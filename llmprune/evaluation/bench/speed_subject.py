"""The model whose speed is measured and predicted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.meta_model import Config, build_meta_model, text_config
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.loading import compute_dtype, load_config
from llmprune.checkpoint.location import headers_of
from llmprune.checkpoint.placement import gpus_of
from llmprune.common.linalg.precision import dtype_name
from llmprune.cut.shape import Shape
from llmprune.evaluation.bench.speed_prediction import dense_shape
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.speed_table import ModelSizes


@dataclass(frozen=True)
class SpeedSubject:
    """A dense model to be timed, on one device: the first GPU, or the CPU."""

    source: ModelSource
    config: Config
    anatomy: Anatomy
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, source: ModelSource, *, config: Config | None = None, anatomy: Anatomy | None = None) -> SpeedSubject:
        """Return the subject of a recipe's model; no weights are read. Raises ModelError."""
        config = load_config(source) if config is None else config
        gpus = gpus_of(source)
        return cls(
            source,
            config,
            discover(config) if anatomy is None else anatomy,
            compute_dtype(source, config, found=headers_of(source) if source.dtype == "auto" else None),
            torch.device("cuda", gpus[0]) if gpus else torch.device("cpu"),
        )

    @cached_property
    def sizes(self) -> ModelSizes:
        """Sizes of the dense model, with the units that can be removed."""
        text, anatomy = text_config(self.config), self.anatomy
        heads = anatomy.heads if anatomy.heads and not anatomy.heads.refusal else None
        experts = anatomy.experts if anatomy.experts and not anatomy.experts.refusal else None
        model = build_meta_model(self.config, self.dtype, trust_remote_code=self.source.trust_remote_code)
        return ModelSizes(
            model_type=anatomy.model_type,
            layers=anatomy.num_layers,
            hidden_size=getattr(text, "hidden_size", None),
            vocabulary=getattr(text, "vocab_size", None),
            widths=anatomy.widths,
            kv_groups=heads and heads.count,
            experts=experts and experts.count,
            top_k=anatomy.experts and anatomy.experts.top_k,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    @property
    def shape(self) -> Shape:
        """Shape of the dense model."""
        return dense_shape(self.sizes)

    @property
    def dtype_name(self) -> str:
        """Name of the type, such as ``float32``."""
        return dtype_name(self.dtype)
