"""A tiny random model of every family of causal language models that the installed transformers has.

A configuration is the family's default with its sizes shrunk by name. Lists with an entry a layer keep one entry of
each kind, so that a tiny model has every kind of layer that the default has.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lrsa_ds.models.wrappers import auto_class

VOCABULARY = 128
NUM_POSITIONS = 512

# The first pattern that a whole key matches gives its value.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_position", NUM_POSITIONS),
    (r".*(dropout|pdrop|layerdrop|dropout_prob|dropout_p|drop_rate|droprate).*", 0),
    (r"(hidden_size|n_embd|d_model|embedding_size|word_embed_proj_dim|emb_dim|lru_width)", 32),
    (r"(.*intermediate_size.*|n_inner|.*ffn_dim|d_ff|ffn_hidden_size|expert_ffn_size|ffn_size)", 48),
    (r"(num_attention_heads|n_head|n_heads|.*attention_heads|num_heads)", 4),
    (r"(head_dim|global_head_dim|attention_head_dim|rotary_dim)", 8),
    (r"(num_hidden_layers|n_layer|n_layers|encoder_layers|decoder_layers|num_layers|num_decoder_layers)", 2),
    (r"(q_lora_rank|kv_lora_rank)", 16),
    (r"qk_nope_head_dim", 8),
    (r"qk_rope_head_dim", 4),
    (r"v_head_dim", 8),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|num_selected_experts)", 2),
    (r"(n_group|topk_group|num_expert_group)", 1),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    (r"(sliding_window|attention_chunk_size|local_attention|window_size)", 16),
)
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")


def families() -> list[str]:
    """The model types that `AutoModelForCausalLM` knows, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **settings: Any) -> PreTrainedConfig:
    """The default configuration of a family with small sizes.

    `settings` are put over them, of the text model where there is more than one.
    """
    default = AutoConfig.for_model(family)
    return AutoConfig.for_model(family, **_shrunk(default, EXCEPTIONS.get(family, {}) | settings))


def _shrunk(default: PreTrainedConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor of the class of `default` takes for a small model."""
    parts = {key: value for key, value in vars(default).items() if isinstance(value, PreTrainedConfig)}
    own = {key: value for key, value in vars(default).items() if not key.startswith("_") and key not in parts}
    text = default.get_text_config(decoder=True)
    small = {key: value for key, given in own.items() if (value := _small(key, given)) is not None}
    if own.get("num_key_value_heads") is not None:  # grouped where the default is
        small["num_key_value_heads"] = 4 if own["num_key_value_heads"] == own.get("num_attention_heads") else 2
    if "qk_rope_head_dim" in own and "head_dim" in small:  # there it is the size of what rotary positions turn
        small["head_dim"] = small["qk_rope_head_dim"]
    small |= {key: _shrunk(part, settings if part is text else {}) for key, part in parts.items()}
    kinds = {key: list(dict.fromkeys(own[key])) for key in PER_LAYER if isinstance(own.get(key), list)}
    if kinds:
        count = max(2, *(len(kind) for kind in kinds.values()))  # a shorter list ends with its last kind several times
        small |= {key: kind + kind[-1:] * (count - len(kind)) for key, kind in kinds.items()}
        small["num_hidden_layers"] = count
    return small | dict(settings)


def _small(key: str, given: Any) -> Any:
    """The value of a key for a small model; None where the default is to stay."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        return None
    if key.endswith(("_token_id", "_token_index", "_token")):
        return min(int(given), VOCABULARY - 1)
    return next((type(given)(size) for pattern, size in SIZES if re.fullmatch(pattern, key)), None)


# Where the sizes above do not make a consistent model, or the default is plainer than the models that are published.
BERTS = ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roberta-prelayernorm")
BERTS += ("roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod")
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]})
QWEN4 = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2)
LLAMA4 = dict(no_rope_layers=[1, 0], moe_layers=[1], floor_scale=8, intermediate_size_mlp=48)
SHARED_KEYS = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4, num_kv_shared_layers=2)
EXCEPTIONS: dict[str, dict[str, Any]] = {name: dict(is_decoder=True) for name in BERTS} | {
    "bailing_hybrid": dict(num_experts_per_token=2, num_experts=4, num_expert_group=1),
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8, attn_layer_indices=[1]),
    "deepseek_v2": dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=500000.0, clip_qkv=8.0)),  # as it is published
    # Two layers that share the keys and values of the other two, as in Gemma 4 E2B and E4B; `gemma4` has none.
    "gemma3n_text": SHARED_KEYS | dict(intermediate_size=48),
    "gemma4_text": SHARED_KEYS | dict(global_head_dim=16),  # heads of full attention are wider than those of windows
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "granite": dict(logits_scaling=8.0, attention_multiplier=0.1, embedding_multiplier=2.0, residual_multiplier=0.5),
    "granitemoe": dict(logits_scaling=8.0, attention_multiplier=0.1),
    "granitemoeshared": dict(logits_scaling=8.0, attention_multiplier=0.1),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8, num_experts=4, moe_topk=2),
    "inkling_text": dict(swa_num_key_value_heads=2, swa_head_dim=8),
    "inkling2_text": dict(swa_num_key_value_heads=2, swa_head_dim=8),
    "kimi_linear": dict(num_experts_per_token=2, num_experts_per_tok=2, num_experts=4, num_expert_group=1),
    # Rotary positions in the layer of chunked attention alone, and queries that are scaled within few tokens.
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mllama": dict(cross_attention_layers=[1], num_hidden_layers=3),  # without images that layer is passed over
    "mamba2": dict(num_heads=8, head_dim=8),
    "ministral": dict(head_dim=8, layer_types=["full_attention", "sliding_attention"]),
    "mistral": dict(sliding_window=None),  # as in all models but the first, whose layers all have one
    "nemotron_h": dict(mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "qwen2": dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]),
    "qwen3": dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v"), MROPE),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), QWEN4),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 64]),
    "seed_oss": dict(attention_dropout=0.1),
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}


def tiny_model(family: str, **settings: Any) -> PreTrainedModel:
    """A small random model in fp32, the same at each call; attention and experts weigh as much as the rest.

    transformers initializes matrices so small that a tiny model predicts nearly the same whatever it attends to.
    """
    torch.manual_seed(0)
    config = tiny_config(family, **settings)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()
