"""Pruned models load equally in transformers 4.x: files of the base in its spelling keep that spelling.

``make .venv-4/.ready`` installs it in a separate environment.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.tiny import tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.meta_model import auto_class
from llmprune.anatomy.types import unit_key
from llmprune.checkpoint.loading import load_config, load_model
from llmprune.checkpoint.result.config_file import ConfigChange
from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.checkpoint.skeleton import tensors_of
from llmprune.cut.apply import cut_config, cut_decoder
from llmprune.cut.decision import Cut
from llmprune.recipe.model import ModelSource

pytestmark = pytest.mark.slow

PYTHON = Path(__file__).parents[2] / ".venv-4" / "bin" / "python"
TEXT = "The fox jumps over 17 dogs.<|end|>"
LAYERS = (0, 2, 3)

_COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "transformers_version": "4.51.3",
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Config files as transformers 4.x writes them.
BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 100000, "rope_scaling": None} | _COMMON,
    "llama3": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3"} | _LLAMA3}
    | _COMMON,
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 8, "rope_theta": 1000000.0, "decoder_sparse_step": 1}
    | {"mlp_only_layers": [0]}
    | _EXPERTS
    | _COMMON,
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    | {"rope_theta": 1000000.0, "rope_local_base_freq": 20000.0, "sliding_window_pattern": 2}
    | _COMMON,
    "phi3": {"model_type": "phi3", "rope_theta": 50000.0, "partial_rotary_factor": 0.5, "pad_token_id": 0}
    | {"original_max_position_embeddings": 128}
    | _COMMON,
    "smollm3": {"model_type": "smollm3", "rope_theta": 5000000.0, "no_rope_layers": [1, 1, 0, 1], "pad_token_id": 0}
    | {"no_rope_layer_interval": 4, "use_sliding_window": False}
    | _COMMON,
    "granitemoehybrid": {"model_type": "granitemoehybrid", "layer_types": ["mamba", "mamba", "attention", "mamba"]}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96}
    | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
    | _COMMON,
    "gpt_neo": {"model_type": "gpt_neo", "vocab_size": 260, "hidden_size": 32, "num_layers": 4, "num_heads": 4}
    | {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2, "window_size": 8}
    | {"intermediate_size": 96, "max_position_embeddings": 128, "torch_dtype": "float32", "eos_token_id": 2},
    "gemma3": {"model_type": "gemma3", "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252}
    | {"mm_tokens_per_image": 4, "torch_dtype": "float32"}
    | {"vision_config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8} | _VISION}
    | {"text_config": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16, "rope_theta": 1000000.0}
       | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}} | _COMMON},
    "qwen2_vl": {"model_type": "qwen2_vl", "rope_theta": 1000000.0, "vision_start_token_id": 250}
    | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "image_token_id": 251, "video_token_id": 252}
    | {"vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}}
    | _COMMON,
}  # fmt: skip

# Script for transformers 4.x in its environment: loads folders, and writes logits and token ids into them.
RELOAD = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__.startswith("4.") and "llmprune" not in sys.modules
text = sys.argv[1]

def load(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    several = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = transformers.AutoModelForImageTextToText if several else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, torch_dtype="auto")
    ids = load_file(folder.parent / "ids.safetensors")["ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    save_file({"logits": logits.float().contiguous()}, folder / "logits-4")
    keys = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return {"keys": keys, "dtype": str(model.dtype), "tokens": tokens}

for folder in map(Path, sys.argv[2:]):
    try:
        found = load(folder)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    (folder / "found-4").write_text(json.dumps(found))
"""


@dataclass
class Case:
    """A base, the model pruned from it, and logits in this version of transformers."""

    base: Path
    pruned: Path
    logits: dict[Path, Tensor]  # of the pruned model, and of one base


def _save_base(folder: Path, raw: dict[str, Any], ids_NL: Tensor) -> Tensor:
    """Save a random model with its config and tokenizer files as 4.x writes them; return its logits."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}
    save_file(older, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    architecture = {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(architecture | raw, indent=2))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "extra_special_tokens": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return torch.as_tensor(model(input_ids=ids_NL, use_cache=False).logits)


def _prune(base: Path, folder: Path) -> None:
    """Remove one of four layers, and the last third of the neurons of every width."""
    source = ModelSource(id=str(base))
    model, config = load_model(source), load_config(source)
    anatomy = discover(config)
    widths = {field: width * 2 // 3 for field, width in anatomy.widths.items()}
    neurons = {
        unit_key(index, unit.path): _first(unit.times * widths[unit.field], unit.experts)
        for index, units in enumerate(anatomy.units)
        for unit in units
    }
    cut = Cut(len(anatomy.units), LAYERS, widths, neurons)
    pruned = cut_decoder(dense_decoder(model), anatomy=anatomy, cut=cut)
    change = ConfigChange(base, config, cut_config(config, anatomy, kept=cut.sizes), cut.layers, False)
    writer = CheckpointWriter(folder, pruned.skeleton, layers_path=pruned.layers_path, change=change)
    writer.write_rest(tensors_of(pruned.skeleton, skip=pruned.layers_path))
    for index in range(len(LAYERS)):
        writer.write_layer(index, pruned.tensors(index))
    writer.finish(10**9, None)


def _first(count: int, experts: int | None) -> Tensor:
    kept_F = torch.arange(count)
    return kept_F if experts is None else kept_F.expand(experts, count).contiguous()


def _logits_here(folder: Path, ids_NL: Tensor) -> Tensor:
    model = load_model(ModelSource(id=str(folder)))
    return torch.as_tensor(model(input_ids=ids_NL, use_cache=False).logits)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Prune every base; load all results here, and in one process of transformers 4.x."""
    if not PYTHON.is_file():
        pytest.skip("no environment with transformers 4.x: make .venv-4/.ready")
    root = tmp_path_factory.mktemp("older")
    ids_NL = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    made = {}
    for name, raw in BASES.items():
        base, folder = root / name / "base", root / name
        dense = _save_base(base, raw, ids_NL)
        _prune(base, folder)
        pruned = folder / "checkpoint"
        save_file({"ids": ids_NL}, folder / "ids.safetensors")
        made[name] = Case(base, pruned, {pruned: _logits_here(pruned, ids_NL)})
        if name == "llama":
            made[name].logits[base] = dense
    folders = [str(folder) for case in made.values() for folder in case.logits]
    command = [str(PYTHON), "-I", "-c", RELOAD, TEXT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.mark.parametrize("name", BASES)
def test_pruned_models_mean_the_same_in_transformers_4(name: str, cases: dict[str, Case]) -> None:
    """Logits and tokens are equal in both versions, and no weight is missing or unexpected."""
    case = cases[name]
    for folder, logits_NLV in case.logits.items():
        found = json.loads((folder / "found-4").read_text())
        assert "error" not in found
        assert found["keys"] == {}
        assert found["dtype"] == "torch.float32"
        assert found["tokens"] == tiny_tokenizer()(TEXT)["input_ids"]
        torch.testing.assert_close(load_file(folder / "logits-4")["logits"], logits_NLV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_the_config_has_only_the_changes_of_the_cut(name: str, cases: dict[str, Case]) -> None:
    """The base's fields keep order and spelling, new fields are lists by layer, and changed ones belong to the cut."""
    case = cases[name]
    base, pruned = (json.loads((folder / "config.json").read_text()) for folder in (case.base, case.pruned))
    part = "text_config" if "text_config" in base else None
    base, pruned = (whole.get(part, whole) for whole in (base, pruned))
    added = [key for key in pruned if key not in base]
    changed = {key for key in base if base[key] != pruned[key]}
    assert [key for key in pruned if key in base] == list(base)
    assert set(added) <= {"layer_types"}
    counts = {"num_hidden_layers", "num_layers", "intermediate_size", "moe_intermediate_size"}
    assert changed <= counts | {"shared_intermediate_size", "mlp_only_layers", "no_rope_layers", "layer_types"} | {
        "attention_types",
        "attention_layers",
    }
    assert changed & counts
