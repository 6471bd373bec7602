"""An adapter is merged into its base, once, to the weights that peft gives it; what cannot be merged is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import VOCABULARY, save_model
from helpers.hub.server import Hub
from helpers.quantized import fp8
from helpers.tiny import tiny_tokenizer
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.checkpoint.converted import adapter_merge
from llmprune.checkpoint.loading import load_config, load_model, load_tokenizer
from llmprune.checkpoint.location import conversion_of, folder_of, identity, quantization_of_source, reads_pickles
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.recipe.model import ModelSource

_PARTS = ["q_proj", "down_proj"]
_IDS = torch.arange(18).view(2, 9)


def _lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": _PARTS, "task_type": "CAUSAL_LM"} | settings)


KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: _lora(use_rslora=True, rank_pattern={"q_proj": 2}),
    "dora": lambda: _lora(use_dora=True, modules_to_save=["input_layernorm"]),
    "embeddings": lambda: _lora(modules_to_save=["embed_tokens", "lm_head"]),
    "rows": lambda: _lora(trainable_token_indices=[3, 7]),
    "loha": lambda: LoHaConfig(r=4, target_modules=_PARTS),
    "ia3": lambda: IA3Config(target_modules=_PARTS, feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with two tiny models in bfloat16, of which the head of ``tied`` is its embeddings."""
    folder = tmp_path_factory.mktemp("bases")
    for name, tied in (("base", False), ("tied", True)):
        save_model(folder / name, tie_word_embeddings=tied, num_hidden_layers=2)
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16).save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def _trained(base: Path, config: PeftConfig, folder: Path, *, rows: int | None = None) -> PeftModel:
    """Save an adapter with random weights; ``rows``: of the embeddings, where tokens were added."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(copy.deepcopy(model), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=True if rows else "auto")
    return PeftModel.from_pretrained(model, folder).eval()


def _merged(folder: Path, base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder_of(ModelSource(id=str(folder), base=str(base)), "weights")
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_checkpoint_has_the_weights_that_peft_merges(kind: str, bases: Path, tmp_path: Path) -> None:
    """Layer by layer and as a whole the weights are equal to the bit, and in the types of the base."""
    wanted = _trained(bases / "base", KINDS[kind](), tmp_path / "adapter").merge_and_unload().state_dict()
    found = _merged(tmp_path / "adapter", bases / "base").state_dict()
    assert found.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
    assert different == []
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("parts", "shared"), [(["q_proj"], True), (["q_proj", "lm_head"], False)])
def test_a_head_that_is_no_more_the_embeddings_is_saved_apart(
    parts: list[str], shared: bool, bases: Path, tmp_path: Path
) -> None:
    """The result predicts as base and adapter do; merging into the shared matrix would change the embeddings too."""
    adapted = _trained(bases / "tied", _lora(target_modules=parts), tmp_path / "adapter").float()
    with torch.no_grad():
        wanted = adapted(_IDS).logits
        model = _merged(tmp_path / "adapter", bases / "tied").float()
        found = model(_IDS).logits
    assert model.config.tie_word_embeddings is shared
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_fine_tune_with_added_tokens_brings_its_tokenizer_and_its_rows(bases: Path, tmp_path: Path) -> None:
    """The plan knows the vocabulary before weights are merged, and the merged files are made once."""
    adapter = tmp_path / "adapter"
    _trained(bases / "tied", _lora(), adapter, rows=VOCABULARY + 3)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(adapter)
    source = ModelSource(id=str(adapter), base=str(bases / "tied"))
    assert load_config(source).vocab_size == VOCABULARY + 3
    assert load_tokenizer(source).convert_tokens_to_ids("<b>") == 258
    conversion, before = conversion_of(source), identity(source)
    assert conversion is not None
    assert not conversion.folder.exists()
    place = folder_of(source, "weights")
    assert _merged(adapter, bases / "tied").get_input_embeddings().weight.shape[0] == VOCABULARY + 3
    assert (identity(source), folder_of(source, "config")) == (before, place)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert identity(source) != before


def test_a_quantized_base_is_dequantized_and_a_pickled_one_read_if_asked_for(tmp_path: Path) -> None:
    """The merged checkpoint is neither; it equals that of an ordinary base with the same values."""
    fp8(tmp_path / "fp8")
    load_model(ModelSource(id=str(tmp_path / "fp8"))).save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    shutil.copytree(tmp_path / "plain", tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    adapter = tmp_path / "adapter"
    wanted = _trained(tmp_path / "plain", _lora(), adapter).merge_and_unload().state_dict()
    for name in ("fp8", "pickled"):
        source = ModelSource(id=str(adapter), base=str(tmp_path / name), pickles=True)
        assert reads_pickles(source) is (name == "pickled")
        found = load_model(source).state_dict()
        assert [one for one, value in wanted.items() if not torch.equal(found[one], value)] == []
        assert quantization_of_source(source) is None
    with pytest.raises(ModelError, match=r"whose base .*pickled cannot be used.*set model\.pickles: true"):
        load_config(ModelSource(id=str(adapter), base=str(tmp_path / "pickled")))


def test_an_adapter_of_the_hub_names_its_base_there(hub: Hub, bases: Path, tmp_path: Path) -> None:
    """A plan of both reads none of the base's weights; the base's own code is not run on the word of an adapter."""
    _trained(bases / "base", _lora(), tmp_path / "adapter")
    _change(tmp_path / "adapter", base_model_name_or_path="org/base")
    for name, folder in (("org/base", bases / "base"), ("org/adapter", tmp_path / "adapter")):
        hub.add_repo(name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    source = ModelSource(id="org/adapter", trust_remote_code=True)
    folder_of(source, "config")
    downloads = [line for line in hub.lines if line.startswith("GET /cdn/")]
    conversion = conversion_of(source)
    assert conversion is not None
    assert conversion.base == "org/base"
    assert len(downloads) == 1  # of the adapter
    folder_of(source, "weights")
    assert len([line for line in hub.lines if line.startswith("GET /cdn/")]) == 2


def _change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Fields of an adapter's config, and parts of the refusal.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "puts trained vectors in front of the text"),
    "unknown": ({"peft_type": "XLORA"}, "which is not merged here"),
    "reward": ({"task_type": "SEQ_CLS"}, "has a classifier's or reward model's head"),
    "changed base": ({"init_lora_weights": "pissa"}, "takes out of its base"),
    "other code": ({"megatron_config": {"a": 1}}, "made for Megatron"),
    "rank": ({"r": 8}, "does not fit .*base .size mismatch"),
    "too few": ({"target_modules": ["q_proj", "k_proj", "down_proj"]}, "its file lacks 4 tensors"),
    "too many": ({"target_modules": ["q_proj"]}, "the base has no place for 4 of its tensors"),
    "another family": ({"target_modules": ["c_attn"]}, "does not fit .*c_attn.* not found"),
}


@pytest.fixture(scope="module")
def adapter(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an adapter that fits the base."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    _trained(bases / "base", _lora(), folder)
    return folder


@pytest.mark.parametrize("reason", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused_by_its_plan(
    reason: str, bases: Path, adapter: Path, tmp_path: Path
) -> None:
    """Config and shapes are enough: the base's weights are not read."""
    fields, message = REFUSED[reason]
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    _change(broken, **fields)
    with pytest.raises(ModelError, match=message):
        load_config(ModelSource(id=str(broken), base=str(bases / "base")))


def test_a_base_that_is_not_found_or_not_allowed_is_refused(bases: Path, adapter: Path, tmp_path: Path) -> None:
    """A file's word is followed to the hub alone, and a key that nothing uses is an error."""
    cases = [
        (ModelSource(id=str(adapter)), "followed only to the hub; set model.base"),
        (
            ModelSource(id=str(adapter), base=str(tmp_path / "none")),
            "cannot be used: the folder .* does not exist",
        ),
        (ModelSource(id=str(adapter), base=str(adapter)), "cannot be used: it is an adapter too"),
        (ModelSource(id=str(bases / "base"), base="org/base"), "is no adapter"),
    ]
    for source, message in cases:
        with pytest.raises(ModelError, match=message):
            folder_of(source, "config")


def test_damaged_files_of_an_adapter_are_refused(bases: Path, adapter: Path, tmp_path: Path) -> None:
    """Weights cut short, pickled, missing, beside others, or too few for the tokenizer."""
    source = ModelSource(id=str(tmp_path / "a"), base=str(bases / "base"))

    def refusal(change: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        change(Path(shutil.copytree(adapter, tmp_path / "a")))
        with pytest.raises((ModelError, CheckpointError)) as raised:
            folder_of(source, "config")
        return str(raised.value)

    def too_many_tokens(folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([f"<{number}>" for number in range(9)])
        tokenizer.save_pretrained(folder)

    weights = adapter_merge.ADAPTER_WEIGHTS
    assert "damaged or cut short" in refusal(lambda folder: (folder / weights).write_bytes(b"\0" * 99))
    assert "never pickles" in refusal(lambda folder: (folder / weights).rename(folder / "adapter_model.bin"))
    assert "without its weights" in refusal(lambda folder: (folder / weights).unlink())
    assert "beside weights of its own" in refusal(lambda folder: (folder / "model.safetensors").touch())
    assert "embeddings of" in refusal(too_many_tokens)
