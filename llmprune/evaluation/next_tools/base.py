"""One check of what a next tool makes of a checkpoint, and the model that it is made on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

State = Literal["works", "fails", "not installed", "not checked"]
TEXT = (
    "The library of the town was built in 1902. Its reading room has 17 tables, a clock that is always late, and a "
    "window to the river. Children come after school; they read about ships, stars and distant countries."
)


class ToolFailure(Exception):  # a row of the table, not an error for people
    """A tool computed another result than it must."""


class NotChecked(Exception):  # a row of the table as well
    """A check that says nothing about this checkpoint, with the reason."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint to check. ``scratch``: empty folder for files; ``report``: ``report.json`` of its run, if any."""

    folder: Path
    scratch: Path
    report: Path | None = None

    def model(self, **options: object) -> PreTrainedModel:
        """Load the model plainly, on the first GPU if there is one."""
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        known = {"dtype": "auto", "use_safetensors": True, "device_map": {"": device}}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, **known | options)
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer. Raises NotChecked where the checkpoint has none."""
        from transformers import AutoTokenizer

        from llmprune.checkpoint.loading import is_empty

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise NotChecked(f"the checkpoint has no tokenizer: {str(error).splitlines()[0]}") from error
        if is_empty(tokenizer):
            raise NotChecked("the checkpoint has no tokenizer")
        return tokenizer

    def ids(self, text: str = TEXT) -> Tensor:
        """Return the token ids [1, L] of a text; of a checkpoint without a tokenizer those of any tokens."""
        import torch
        from transformers import AutoConfig

        try:
            ids: list[int] = self.tokenizer()(text)["input_ids"]
            return torch.tensor([ids])
        except NotChecked:
            config = AutoConfig.from_pretrained(self.folder).get_text_config()
            return torch.arange(3, 35)[None] % int(config.vocab_size)


@dataclass(frozen=True)
class ToolCheck:
    """A check of one tool.

    ``work``: returns a sentence on the outcome, or raises. ``modules``: Python modules that it needs; ``install``:
    command that installs them. ``missing``: reason why the tool is not there, where modules do not tell.
    """

    name: str
    work: Callable[[Subject], str]
    modules: Sequence[str] = ()
    install: str = ""
    missing: Callable[[], str | None] = lambda: None

    @property
    def absent(self) -> str | None:
        """Command that installs the tool; None where it is installed."""
        if all(find_spec(module) for module in self.modules):
            return self.missing()
        return self.install


def logits(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """Return the logits [B, L, V] in float32, on the CPU. Raises ToolFailure for values that are not finite."""
    import torch

    with torch.no_grad():
        found_BLV: Tensor = model(input_ids=ids_BL.to(model.device), use_cache=False).logits.float().cpu()
    if not found_BLV.isfinite().all():
        raise ToolFailure("the logits are not finite")
    return found_BLV


def divergence(wanted_BLV: Tensor, found_BLV: Tensor, *, most: float, tool: str) -> str:
    """Return the mean KL divergence in words. Raises ToolFailure above ``most`` nats."""
    from llmprune.common.linalg.kl_divergence import kl_divergence

    value = kl_divergence(wanted_BLV, found_BLV).mean().item()
    told = f"KL {value:.2g} to plain transformers"
    if not value <= most:
        raise ToolFailure(f"{tool} computes another model: {told}, above {most:g}")
    return told
