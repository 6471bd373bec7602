"""A small model of another family than SmolLM2, trained here, to see whether defaults hold on it.

    python eval/benchmarks/second_model.py DATA OUTPUT [--minutes 25] [--within 60]

It is shaped like Gemma 3: norms before and behind attention and MLP, GeGLU, norms of queries and keys, sliding and full
attention, tied embeddings that are scaled, and a tokenizer that puts <bos> in front of a text. 5.8 M parameters in 6
layers, 4,096 tokens, windows of 256. DATA is a folder of texts (``texts.py``); OUTPUT becomes an ordinary checkpoint
with its tokenizer and ``training.json``, the losses by kind of text. ``quality.py DATA --model OUTPUT`` prunes it.

AdamW in bfloat16 autocast. The learning rate is a cosine over the minutes of processor time, or over the wall-clock
minutes of ``--within`` where those pass sooner: a slow machine takes fewer steps, and the schedule still ends.

Shapes in names: B batch, N windows, L sequence length, T tokens of the training text.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from texts import judging_documents, training_documents, windows_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>")  # ids 0, 1 and 2, as in Gemma
VOCABULARY = 4096
LENGTH = 256
JUDGED = 32  # windows of each kind of text


@dataclass(frozen=True)
class Schedule:
    """Training: minutes of processor time and of wall-clock time, windows of a step, the highest learning rate."""

    minutes: float
    within: float
    batch: int = 8
    rate: float = 3e-3
    warmup: float = 0.04  # share of the schedule


def bpe_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts <bos> in front of a text and splits digits."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair=None, special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def shape(vocabulary: int, *, layers: int, hidden: int) -> Gemma3TextConfig:
    """Gemma 3's configuration at a small size: two layers of sliding attention, then one of full attention."""
    return Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        query_pre_attn_scalar=hidden // 4,
        max_position_embeddings=LENGTH,
        sliding_window=LENGTH // 2,
        layer_types=["full_attention" if index % 3 == 2 else "sliding_attention" for index in range(layers)],
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<eos>"),
        bos_token_id=SPECIAL.index("<bos>"),
    )


def token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return all documents as one row of ids, int64 [T]: each begins with <bos> and ends with <eos>."""
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text, verbose=False)["input_ids"]
        ids.append(SPECIAL.index("<eos>"))
    return torch.tensor(ids)


def train(model: Gemma3ForCausalLM, stream_T: Tensor, schedule: Schedule) -> int:
    """Train on windows from random places of the stream, <bos> in front of each; returns the steps taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    begin_B1 = torch.full((schedule.batch, 1), SPECIAL.index("<bos>"))
    processor, clock, step, done = time.process_time(), time.monotonic(), 0, 0.0
    model.train()
    while done < 1:
        rate = schedule.rate * min(done / schedule.warmup, (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = max(rate, schedule.rate / 100)
        starts_B = torch.randint(len(stream_T) - LENGTH + 1, (schedule.batch,), generator=generator)
        ids_BL = torch.cat([begin_B1, stream_T[starts_B[:, None] + torch.arange(LENGTH - 1)]], 1)
        loss = _loss(model, ids_BL)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        spent, passed = time.process_time() - processor, time.monotonic() - clock
        done = max(spent / schedule.minutes, passed / schedule.within) / 60
        if step % 50 == 0:
            print(f"step {step}, {done:.0%} of the schedule: loss {loss.item():.3f}", flush=True)
    return step


@torch.inference_mode()
def losses(model: Gemma3ForCausalLM, windows: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean cross entropy of the next token of each kind's windows [N, L], in nats."""
    model.eval()
    return {
        kind: round(sum(_loss(model, ids_1L).item() for ids_1L in torch.split(windows_NL, 1)) / len(windows_NL), 3)
        for kind, windows_NL in windows.items()
    }


def _loss(model: Gemma3ForCausalLM, ids_BL: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())


def main() -> None:
    """Train the tokenizer and the model, save both, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=25.0, help="processor time of the training")
    parser.add_argument("--within", type=float, default=120.0, help="wall-clock minutes after which it ends anyway")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    documents = [text for texts in training_documents(arguments.data).values() for text in texts]
    tokenizer = bpe_tokenizer(documents, arguments.vocabulary)
    stream_T = token_stream(documents, tokenizer)
    model = Gemma3ForCausalLM(shape(len(tokenizer), layers=arguments.layers, hidden=arguments.hidden))
    print(f"{model.num_parameters():,} parameters, {len(stream_T):,} tokens of text", flush=True)
    schedule = Schedule(arguments.minutes, arguments.within)
    steps = train(model, stream_T, schedule)
    windows = {
        kind: windows_of(texts, tokenizer, count=JUDGED, length=LENGTH)
        for kind, texts in judging_documents(arguments.data).items()
    }
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    seen = steps * schedule.batch * LENGTH
    figures = {"parameters": model.num_parameters(), "steps": steps, "tokens": seen, "losses": losses(model, windows)}
    (arguments.output / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
