"""Tiny image-text models with random weights, processors of their own, and data sets of pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 280,
    "max_position_embeddings": 512,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def picture(number: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Return a picture that differs by its number."""
    values = torch.rand(size[1], size[0], 3, generator=torch.Generator().manual_seed(number))
    return Image.fromarray((values * 255).byte().numpy())


def image_data(folder: Path, rows: int, *, first: int = 0) -> Path:
    """Write a data set of pictures with texts as parquet, with the bytes in the rows; return its path.

    ``first``: number of the first picture; the texts do not depend on it.
    """
    import datasets

    listed = []
    for number in range(rows):
        content = io.BytesIO()
        picture(first + number).save(content, format="PNG")
        listed.append({"bytes": content.getvalue(), "path": None})
    texts = [f"picture {number} shows noise: {'x' * (number % 7)}" for number in range(rows)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    path = folder / "pictures.parquet"
    datasets.Dataset.from_dict({"image": listed, "text": texts}, features=features).to_parquet(str(path))
    return path


def tokenizer(**extra: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with extra special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", extra_special_tokens=extra
    )


def llava(folder: Path) -> Path:
    """Save a Llava of a Llama and CLIP's tower: every image has as many tokens, inputs have no row for a window."""
    words = tokenizer(image_token="<image>")
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return _saved(transformers.LlavaForConditionalGeneration, config, processor=processor, folder=folder)


def gemma3(folder: Path) -> Path:
    """Save a Gemma 3: tokens of an image attend to each other, which an input for each token marks."""
    words = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    pictures = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(image_processor=pictures, tokenizer=words, image_seq_length=4)
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(
            **TEXT, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        ),
        mm_tokens_per_image=4,
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )
    return _saved(transformers.Gemma3ForConditionalGeneration, config, processor=processor, folder=folder)


def idefics3(folder: Path) -> Path:
    """Save an Idefics 3 (SmolVLM): several tiles an image, inputs with a row for each window."""
    words = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    pictures = transformers.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = transformers.Idefics3Processor(image_processor=pictures, tokenizer=words, image_seq_len=1)
    config = transformers.Idefics3Config(
        vision_config=_VISION,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return _saved(transformers.Idefics3ForConditionalGeneration, config, processor=processor, folder=folder)


def _saved(kind: Any, config: Any, *, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
