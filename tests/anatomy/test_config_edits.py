"""Config edits: every field by layer is known, every family is cut or refused, parts other than the text are kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import verify_here, write_recipe
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from llmprune import ModelError, Recipe, run
from llmprune.anatomy import config_edits
from llmprune.anatomy.config_edits import counts_heads, edit_config
from llmprune.anatomy.depth import find_depth
from llmprune.anatomy.discovery import discover
from llmprune.anatomy.known_refusals import DEPTH_REFUSALS, MODEL_REFUSALS, SHARING_REFUSALS
from llmprune.anatomy.layer_equivalence import check_layer_equivalence
from llmprune.anatomy.layer_kinds import kinds_of, starts_of_spans
from llmprune.anatomy.meta_model import build_meta_model, find_layers, text_config
from llmprune.testing import VOCABULARY, tiny_config, tiny_model

# Words in names of fields that may count, list or number layers.
_SUSPICIOUS = re.compile(
    r"layer|_every_|interval|period|offset|_step|pattern|_freq|idx|_ids$|indexes|indices|nextn|mtp|_start|_end"
    r"|skip|block|interleave|stage|cycle|modes|_types?$|group"
)
# Fields of text decoders with such names that need no edit, by reason.
_HARMLESS = {
    "is the number of layers itself": "n_layer n_layers num_hidden_layers num_layers layers num_blocks decoder_layers "
    "num_decoder_layers",
    "gives every layer the same size, constant or switch": "altup_active_idx block_auto_adjust_ff_dim "
    "block_ffn_dim_multiplier block_multiple_of block_size enable_moe_block index_block_size index_local_blocks "
    "index_topk_blocks layer_norm_elementwise_affine layer_norm_eps layer_norm_epsilon layerdrop mamba_n_groups "
    "mamba_ngroups n_group n_groups norm_type num_expert_group num_query_groups num_random_blocks o_groups "
    "output_gate_type position_embedding_type qk_layer_norms qk_layernorm qk_norm_type rope_interleave time_step_floor "
    "time_step_init_scheme time_step_limit time_step_max time_step_min time_step_rank time_step_scale topk_group "
    "attention_type alpha_type attn_type adapter_layer_norm adapter_reuse_layer_norm do_layer_norm_before "
    "apply_residual_connection_post_layernorm decoder_layerdrop layernorm_embedding hidden_size_per_layer_input",
    "belongs to parts outside the decoder's layers": "_remove_final_layer_norm "
    "encoder_hash_byte_group_nb_functions encoder_hash_byte_group_size encoder_hash_byte_group_vocab "
    "encoder_layerdrop encoder_layers num_encoder_layers "
    "decoder_start_token_id prompt_types segment_types summary_first_dropout summary_last_dropout summary_type "
    "vocab_size_per_layer_input return_last_states use_weighted_layer_sum aligner_num_add_layers max_period min_period "
    "num_inference_steps time_sampling_offset problem_type model_type",
    "is periodic, and only makes the list by layer that is filtered": "global_attn_every_n_layers "
    "interleave_moe_layer_step layer_group_size no_rope_layer_interval prefix_dense_sliding_window_pattern "
    "sliding_window_pattern _sliding_window_pattern",
    "sets kinds by index, which are found": "attn_layer_offset attn_layer_period cross_layer_interval "
    "expert_layer_offset expert_layer_period moe_layer_interval n_layers_per_attn_res_block "
    "scale_attn_by_inverse_layer_idx",
    "counts runs of layers, in a model whose layers are not one list": "H_cycles L_bp_cycles L_cycles "
    "num_layers_per_stack num_mem_blocks",
    "describes layers after the decoder, whose number is set to 0": "mtp_hidden_states_first mtp_layer_types "
    "mtp_layers_block_type mtp_local_layer_ids mtp_loss_scaling_factor mtp_mlp_layer_types",
    "shares keys and values between layers: refused": "num_kv_shared_layers",
    "selects what is trained": "freeze_text_layers freeze_vision_layers",
}
_TABLES = {
    name
    for table, names in vars(config_edits).items()
    if table.isupper() and isinstance(names, tuple | dict)
    for name in names
}


def _text_configs() -> dict[type, PretrainedConfig]:
    """Return the default config of every text decoder that transformers can build, by class."""
    found: dict[type, PretrainedConfig] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for config_class in mapping:
            try:
                text = text_config(config_class())
            except StrictDataclassClassValidationError:  # an assistant of another model has no valid defaults
                continue
            found.setdefault(type(text), text)
    return found


def test_every_field_by_layer_is_known() -> None:
    """Every field that may list, count or number layers is in a table of config_edits, or known to be harmless."""
    harmless = {name for names in _HARMLESS.values() for name in names.split()}
    unknown = set()
    seen = set()
    for config_class, config in _text_configs().items():
        count = getattr(config, "num_hidden_layers", None)
        for name, value in config.to_dict().items():
            seen.add(name)
            by_layer = isinstance(value, list | dict) and isinstance(count, int) and len(value) == count > 2
            if (
                name not in _TABLES
                and not counts_heads(name)
                and (by_layer or (name not in harmless and _SUSPICIOUS.search(name)))
            ):
                unknown.add(f"{config_class.__name__}.{name} = {value!r:.60}")
    assert not unknown, (
        "these fields may refer to layers: put each into a table of llmprune/anatomy/config_edits.py, "
        f"or with its reason into _HARMLESS here: {sorted(unknown)}"
    )
    assert not harmless - seen, f"no config has these any more: {harmless - seen}"


@pytest.mark.parametrize(
    ("family", "fields", "edited"),
    [
        ("qwen2", {"max_window_layers": 2}, {"max_window_layers": 1}),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}, {"mlp_only_layers": [1]}),
        ("deepseek_v3", {"first_k_dense_replace": 3}, {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, {"no_rope_layers": [1, 1]}),
        ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 3}, {"moe_layer_start_index": 1}),
        ("gpt_neo", {}, {"attention_layers": ["local", "local"], "num_layers": 2}),
        ("gemma3", {}, {"num_hidden_layers": 2}),
        ("qwen3_moe", {"decoder_sparse_step": 2}, {"decoder_sparse_step": 1, "mlp_only_layers": []}),
        ("qwen3_moe", {"decoder_sparse_step": 3}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}),
        ("recurrent_gemma", {}, {"block_types": ["recurrent", "recurrent"]}),
    ],
)
def test_fields_follow_the_layers(family: str, fields: dict[str, Any], edited: dict[str, Any]) -> None:
    """Without layers 0 and 2 of four, lists are filtered, index lists renumbered and counts reduced."""
    config = text_config(edit_config(tiny_config(family, **fields), [1, 3], widths={}))
    assert {name: getattr(config, name) for name in edited} == edited


@pytest.mark.parametrize(
    ("family", "fields", "size"),
    [
        *((family, {}, 1) for family in ("qwen3_next", "cohere2", "llama4_text", "nemotron_h", "kimi_linear")),
        ("qwen3_moe", {"decoder_sparse_step": 2}, 1),
        ("recurrent_gemma", {}, 1),
        ("jamba", {}, 2),
        ("diffllama", {}, 2),
    ],
)
def test_depth_cut_equals_skipped_layers(family: str, fields: dict[str, Any], size: int) -> None:
    """A model without some layers computes the same as the dense model that skips them, wherever they can be removed.

    They can be where the kinds that the anatomy found say so.
    """
    model = tiny_model(family, **fields)
    path, layers = find_layers(model)
    meta = build_meta_model(model.config)
    by_index, refusal = find_depth(meta, trust_remote_code=False)
    assert refusal is None
    ids_BL = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    compared = []
    for start in range(len(layers) - size + 1):
        removed = range(start, start + size)
        keep = [index for index in range(len(layers)) if index not in removed]
        try:
            pruned = build_meta_model(edit_config(model.config, keep, widths={}), torch.float32)
            check_layer_equivalence(meta, pruned, keep=keep, changing=set())
        except ModelError:
            continue
        pruned.load_state_dict(_moved(model.state_dict(), path, keep), strict=False, assign=True)
        pruned.tie_weights()
        for index in removed:
            layers[index].forward = lambda hidden, *_, **__: hidden
        with torch.no_grad():
            expected_BLV = model(ids_BL, use_cache=False).logits
            torch.testing.assert_close(pruned(ids_BL, use_cache=False).logits, expected_BLV, rtol=1e-4, atol=1e-4)
        for index in removed:
            del layers[index].forward
        compared.append(start)
    assert compared
    if by_index:
        assert compared == list(starts_of_spans(kinds_of(by_index, len(layers)), size))


def _moved(tensors: dict[str, torch.Tensor], path: str, keep: Sequence[int]) -> dict[str, torch.Tensor]:
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{path}.")}
    return rest | {
        f"{path}.{new}.{name.removeprefix(f'{path}.{old}.')}": tensor
        for new, old in enumerate(keep)
        for name, tensor in tensors.items()
        if name.startswith(f"{path}.{old}.")
    }


@pytest.mark.parametrize("family", sorted({*MODEL_REFUSALS} - {"glm5_next_text"}))
def test_refused_families_get_their_reason(family: str) -> None:
    """Every model type in the table of refusals is refused with the reason in the table."""
    with pytest.raises(ModelError, match=re.escape(MODEL_REFUSALS[family])):
        discover(tiny_config(family))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gemma4_text", {}, "embed_tokens_per_layer.weight outside the layers depends on their number"),
        ("minicpm3", {}, "layer 1 would become layer 0 and change there (residual_scale"),
        ("qwen3_vl", {}, DEPTH_REFUSALS["deepstack_visual_indexes"]),
    ],
)
def test_depth_is_refused_with_a_reason(family: str, fields: dict[str, Any], message: str) -> None:
    """Where no config can express fewer layers, the anatomy has the reason."""
    assert message in (discover(tiny_config(family, **fields)).depth_refusal or "")


def test_shared_keys_and_values_are_refused() -> None:
    """A model whose layers reuse the keys and values of others is refused."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = tiny_config("gemma4_text", layer_types=kinds, num_kv_shared_layers=2)
    with pytest.raises(ModelError, match=re.escape(SHARING_REFUSALS["kv_sharing_modes"])):
        discover(config)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5gemma2", "encoder"),
        ("zamba", "share weights"),
        ("paligemma", "attend in both directions"),
        ("clip", "an encoder of images and texts"),
    ],
)
def test_no_decoder_is_refused(family: str, message: str) -> None:
    """Encoders, encoder-decoders and models that attend in both directions are refused."""
    with pytest.raises(ModelError, match=message):
        discover(tiny_config(family))


def test_state_between_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that pass more than hidden states to the next are detected without an entry in a table."""
    monkeypatch.delitem(MODEL_REFUSALS, "zaya")
    tiny_model("zaya").save_pretrained(tmp_path / "base")
    recipe = _token_recipe(tmp_path, {"depth": {"remove": 1}})
    with pytest.raises(ModelError, match="hands more than hidden states from layer to layer"):
        run(recipe, tmp_path / "run")


def _token_recipe(folder: Path, sections: dict[str, Any]) -> Recipe:
    ids_NL = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids_NL}, folder / "ids.safetensors")
    tokens = {"tokens": str(folder / "ids.safetensors"), "key": "ids", "sequence_length": 24}
    absent = {"depth": None, "width": None}
    return Recipe.load(
        write_recipe(folder / "recipe.yaml", folder / "base", "", calibration=tokens, **(absent | sections))
    )


def test_text_part_of_a_vision_model_is_pruned_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text decoder loses layers and neurons; vision tensors, their config and the processor's files do not."""
    verify_here(monkeypatch)
    model = tiny_model("gemma3")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"size": 7}')
    run(_token_recipe(tmp_path, {"depth": {"remove": 1}, "width": {"neurons": 64}}), tmp_path / "run")
    result = tmp_path / "run" / "model"
    reloaded, info = AutoModelForImageTextToText.from_pretrained(result, output_loading_info=True)
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", result))
    vision = {name for name in dense if "vision" in name or "projector" in name}
    assert not any(info.values())
    assert vision
    assert all(torch.equal(dense[name], pruned[name]) for name in vision)
    assert type(reloaded) is type(model)
    assert (text_config(reloaded.config).num_hidden_layers, text_config(reloaded.config).intermediate_size) == (3, 64)
    assert reloaded.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    assert (result / "preprocessor_config.json").read_text() == '{"size": 7}'
