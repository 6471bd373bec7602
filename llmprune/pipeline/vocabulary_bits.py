"""Bits per byte of the dense model and of the one with fewer tokens, on the held-out text of a run."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.evaluation.bits_per_byte import EncodedText, encode_again
from llmprune.evaluation.perplexity import perplexity
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.pipeline.context import RunContext
from llmprune.recipe.model import ModelSource


def measure_bits_per_byte(
    context: RunContext, source: ModelSource, *, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[float, float] | None:
    """Return the bits per byte of the dense and the final model; None where the recipe has no held-out text.

    ``tokenizer``: of the final model in ``source``. Each model predicts the text in its own tokens, in windows of the
    same length. Every process calls this and gets the same value.
    """
    inputs = context.inputs
    held_out, before = inputs.held_out_text, inputs.tokenizer
    if held_out is None or before is None or tokenizer is None:
        return None
    again_NL = encode_again(held_out, before=before, after=tokenizer)
    if again_NL is None:
        return None
    begin = tuple(tokenizer.convert_tokens_to_ids(before.convert_ids_to_tokens(list(held_out.begin))))
    dense = EncodedText.of(held_out.windows_NL, before, begin=held_out.begin)
    final = EncodedText.of(again_NL, tokenizer, begin=begin)
    reference = inputs.reference
    found = _bits(context, reference, text=dense, name="dense")
    inputs.release()
    return found, _bits(context, open_decoder(source, working=inputs.whole_devices), text=final, name="pruned")


def _bits(context: RunContext, decoder: Decoder, *, text: EncodedText, name: str) -> float:
    memory, folder = context.recipe.calibration.stream_memory, context.folder.path

    def measure(batch_size: int) -> float:
        store = HiddenStateStore(memory, folder, device_bytes=context.inputs.hidden_state_bytes)
        return perplexity(decoder, text.windows_NL, batch_size=batch_size, name=name, store=store, begin=text.begin)

    found = context.batches.held_out.run(f"held-out text: {name}", measure, release=decoder.save_memory)
    decoder.release()
    return text.bits(found)
