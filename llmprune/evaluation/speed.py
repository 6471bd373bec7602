"""Generation speed of dense and pruned, timed in turn so that a machine's drift meets both.

Shapes: B prompts, L prompt tokens.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from llmprune.errors import RecipeError
from llmprune.evaluation.section import Speed
from llmprune.report.value import SpeedFigures

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


def require_positions(settings: Speed, config: PretrainedConfig) -> None:
    """Raise RecipeError where prompt and new tokens are more than the model has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.prompt_tokens + settings.new_tokens > positions:
        raise RecipeError(
            f"evaluation.speed: prompt_tokens {settings.prompt_tokens} + new_tokens {settings.new_tokens} "
            f"exceed the model's {positions} positions; shorten one of them"
        )


def compare_speed(dense: PreTrainedModel, pruned: PreTrainedModel, settings: Speed) -> SpeedFigures:
    """Greedy generation after random prompts; tokens per second count new tokens over prefill and decoding.

    Each model warms up once. Raises RecipeError where the model has too few positions.
    """
    import torch

    models = (dense, pruned)
    for model in models:
        require_positions(settings, model.config)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    shape = (settings.batch_size, settings.prompt_tokens)
    prompts_BL = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    for model in models:
        _tokens_per_second(model, prompts_BL, settings.new_tokens)
    pairs = [
        (
            _tokens_per_second(dense, prompts_BL, settings.new_tokens),
            _tokens_per_second(pruned, prompts_BL, settings.new_tokens),
        )
        for _ in range(settings.repeats)
    ]
    ratios = [after / before for before, after in pairs]
    return SpeedFigures(
        dense=median(before for before, _ in pairs),
        pruned=median(after for _, after in pairs),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        batch_size=settings.batch_size,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        device=" and ".join(sorted({_device_name(input_device(model)) for model in models})),
    )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong; an offloaded model takes and gives its tensors on the CPU."""
    import torch

    return torch.device("cpu") if model.device.type == "meta" else model.device


def _tokens_per_second(model: PreTrainedModel, prompts_BL: Tensor, new_tokens: int) -> float:
    import torch
    from transformers import GenerationConfig

    # generate() fills what is None here from the model's own generation settings, so what would
    # change the work, or warn about being ignored, is set: sampling, penalties, beams, an early end.
    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=0,
    )
    device = input_device(model)
    inputs_BL = prompts_BL.to(device)
    mask_BL = torch.ones_like(inputs_BL)
    _synchronize(device)
    start = perf_counter()
    output_BL = model.generate(inputs_BL, attention_mask=mask_BL, generation_config=greedy)
    _synchronize(device)
    seconds = perf_counter() - start
    assert output_BL.shape[1] == prompts_BL.shape[1] + new_tokens, "generation ended early"
    return float(prompts_BL.shape[0] * new_tokens / seconds)


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
