"""Tokens of texts with images, and the images as a model's inputs, both by the model's own processor.

Shapes: B windows, L sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import CalibrationError, ModelError
from llmprune.common.window_images import ImagesOfWindow, WindowImages
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = ("input_ids", "attention_mask")
_TOKENS = ("image_token", "boi_token")  # attributes of processors: the token that stands for an image in a text


@dataclass(frozen=True)
class ImageDocument:
    """A text with images as tokens, which refer to ``images`` by −(k + 1)."""

    tokens: list[int]
    images: Sequence[Any]
    text: str

    @property
    def least(self) -> int:
        """Number of tokens up to the end of the last image."""
        return max((place + 1 for place, token in enumerate(self.tokens) if token < 0), default=0)


class ImageProcessor:
    """A processor of transformers.

    ``placeholder``: the token in a window whose embedding the model replaces; ``shown``: the model's name for the user.
    """

    def __init__(self, processor: Any, *, placeholder: int, shown: str) -> None:
        self._processor, self.placeholder, self._shown = processor, placeholder, shown

    def document(self, row: Mapping[str, Any], images: Sequence[Any], *, source: TextSource) -> ImageDocument | None:
        """Return a row as tokens; None where it has no text. Raises CalibrationError where the model cannot take it."""
        text = self._text(row, images, source=source)
        if not text:
            return None
        tokens: list[int] = self._encoded(text, images)["input_ids"][0].tolist()
        places = [place for place, token in enumerate(tokens) if token == self.placeholder]
        counts = [self._tokens_of(image) for image in images]
        if len(places) != sum(counts):
            raise CalibrationError(
                f"a row of {source.dataset} has {len(images)} images of {sum(counts)} tokens, and its text has places "
                f"for {len(places)}; put {self.marker!r} into the text once for each image, or leave it out"
            )
        references = [image for image, count in enumerate(counts) for _ in range(count)]
        for place, image in zip(places, references, strict=True):
            tokens[place] = -(image + 1)
        return ImageDocument(tokens, images, text)

    def images(self, images: Sequence[Any]) -> WindowImages:
        """Return the images of all windows with their preparation."""
        return WindowImages(tuple(images), self.placeholder, self._prepare, self._is_nested, self._marks)

    def _text(self, row: Mapping[str, Any], images: Sequence[Any], *, source: TextSource) -> str:
        column = source.messages_field or source.text_field or "text"
        if column not in row:
            key = "messages_field" if source.messages_field else "text_field"
            raise CalibrationError(f"{source.dataset} has no column {column!r}; set {key} to one of: {', '.join(row)}")
        value = row[column]
        if source.messages_field:
            return self._conversation(value, images, source=source) if value else ""
        if not isinstance(value, str) or not value.strip():
            return ""
        return value if self.marker in value else self.marker * len(images) + value

    def _conversation(self, messages: Any, images: Sequence[Any], *, source: TextSource) -> str:
        """Return a conversation by the chat template. Images that it does not place come first."""
        try:
            turns = [dict(message) | {"content": _parts(message["content"])} for message in messages]
            placed = sum(part.get("type") == "image" for turn in turns for part in turn["content"])
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = [{"type": "image"}] * (len(images) - placed) + first["content"]
            return str(self._processor.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise CalibrationError(
                f"{source.messages_field!r} of {source.dataset} does not fit the processor's chat template: "
                f"{type(error).__name__}: {error}; it needs lists of {{role: …, content: …}} with a user's turn"
            ) from error

    def _encoded(self, text: str, images: Sequence[Any]) -> Mapping[str, Tensor]:
        return self._call([text], [list(images)] if images else None)

    def _call(self, texts: list[str], images: Sequence[ImagesOfWindow] | None) -> Mapping[str, Tensor]:
        try:
            encoded: Mapping[str, Tensor] = self._processor(
                text=texts, images=images, add_special_tokens=False, padding=len(texts) > 1, return_tensors="pt"
            )
        except Exception as error:  # processors raise anything
            raise CalibrationError(
                f"the processor of {self._shown} refuses a row ({type(error).__name__}: {error}); correct the row, or "
                "calibrate on text alone"
            ) from error
        return encoded

    @cached_property
    def marker(self) -> str:
        """The text of the token that stands for one image in a text."""
        for name in _TOKENS:
            token = getattr(self._processor, name, None)
            try:
                if isinstance(token, str) and self._stands_for_an_image(token):
                    return token
            except CalibrationError:
                continue
        raise ModelError(
            f"no token of the processor of {self._shown} stands for an image in a text; calibrate this model on text "
            "alone (remove images_field)"
        )

    def _stands_for_an_image(self, token: str) -> bool:
        return bool((self._encoded(token, [_sample()])["input_ids"] == self.placeholder).any())

    def _tokens_of(self, image: Any) -> int:
        return int((self._encoded(self.marker, [image])["input_ids"] == self.placeholder).sum())

    def _prepare(self, windows: Sequence[ImagesOfWindow]) -> dict[str, Tensor]:
        """Return the model's inputs for the images of each of several windows."""
        encoded = self._call([self.marker * len(images) for images in windows], windows)
        return {name: value for name, value in encoded.items() if name not in _TEXT and name not in self._marks}

    @cached_property
    def _is_nested(self) -> bool:
        """True if the inputs of two images in one window are one row."""
        encoded = self._prepare([[_sample(), _sample()]])
        return all(len(value) == 1 for value in encoded.values())

    @cached_property
    def _marks(self) -> dict[str, int]:
        """Inputs with a value for each token, and that value at the placeholders of an image; 0 elsewhere.

        Raises ModelError where the values say more than which tokens are an image's.
        """
        encoded = self._encoded(f"a{self.marker}b", [_sample()])
        ids_BL = encoded["input_ids"]
        marks = {}
        for name, value_BL in encoded.items():
            if name in _TEXT or value_BL.shape != ids_BL.shape:
                continue
            of_image = ids_BL == self.placeholder
            mark = int(value_BL[of_image][0])
            if not bool((value_BL == of_image.long() * mark).all()):
                raise ModelError(
                    f"the input {name} of {self._shown} marks more than the tokens of images; calibrate this model on "
                    "text alone (remove images_field)"
                )
            marks[name] = mark
        return marks


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]


def _sample() -> Any:
    """Return a small picture that is neither plain nor random."""
    from PIL import Image

    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")
