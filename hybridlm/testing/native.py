"""Small configs of transformers' own families, so that its classes can be held to the same promises.

The twins are random, and everything that a check could miss at this size is made to matter: windows are shorter than
the text, router losses are on, and the state of every mixer moves the logits.
"""

from collections.abc import Iterable
from typing import Any

from transformers import CONFIG_MAPPING

_SIZES = {"vocab_size": 67, "hidden_size": 32}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
_TRANSFORMER = _SIZES | _TOKENS | _ATTENTION | {"intermediate_size": 48}
_ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
_MLA = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 1, "num_experts_per_tok": 2},
}
_MAMBA2 = {
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
}

# the defaults of each family, made small; what differs from them otherwise is what makes a check sharp
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": _TRANSFORMER | {"num_hidden_layers": 2},
    "mistral": _TRANSFORMER | {"num_hidden_layers": 2, "sliding_window": 24},
    "mixtral": _TRANSFORMER | _ROUTER | {"num_hidden_layers": 2, "num_local_experts": 4},
    "deepseek_v3": _TRANSFORMER
    | _MLA
    | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "mamba": _SIZES | _TOKENS | {"num_hidden_layers": 2, "state_size": 8},
    "falcon_mamba": _SIZES | _TOKENS | {"num_hidden_layers": 2, "state_size": 8},
    "mamba2": _SIZES
    | _TOKENS
    | {"num_hidden_layers": 2, "state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": _TRANSFORMER
    | _ROUTER
    | {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 4},
    "bamba": _TRANSFORMER | _MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "zamba2": _TRANSFORMER
    | {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]}
    | {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_key_value_heads": 4},
    "falcon_h1": _TRANSFORMER | _MAMBA2 | {"num_hidden_layers": 2, "mamba_d_ssm": 64},
    "nemotron_h": _TRANSFORMER
    | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "head_dim": 8, "ssm_state_size": 8}
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4}
    | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    "granitemoehybrid": _TRANSFORMER
    | _ROUTER
    | _MAMBA2
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    | {"num_local_experts": 4, "shared_intermediate_size": 16, "position_embedding_type": "rope"},
    "qwen3_next": _TRANSFORMER
    | _ROUTER
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    | {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    | {"num_experts": 4, "num_experts_per_tok": 2},
    "kimi_linear": _TRANSFORMER
    | _MLA
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    | {"linear_head_dim": 8, "linear_num_heads": 4, "num_local_experts": 4, "first_k_dense_replace": 1},
    "olmo_hybrid": _TRANSFORMER
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "lfm2": _TRANSFORMER
    | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "minimax": _TRANSFORMER
    | _ROUTER
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    | {"num_local_experts": 4, "block_size": 8, "head_dim": 8},
    "recurrent_gemma": _SIZES
    | _TOKENS
    | {"num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4, "lru_width": 32}
    | {"attention_window_size": 24},
    "gpt_oss": _TRANSFORMER
    | _ROUTER
    | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
FAMILIES = tuple(_OPTIONS)


def native_config(family: str) -> Any:
    """The small config of a family.

    Raises:
        ValueError: There is no twin of that name, or this version of transformers lacks the family.
    """
    if family not in _OPTIONS:
        raise ValueError(f"native: unknown {family!r}, expected one of {list(FAMILIES)}")
    if family not in CONFIG_MAPPING:
        raise ValueError(f"native: this version of transformers has no {family!r}")
    return CONFIG_MAPPING[family](**_OPTIONS[family])


def split_families(text: str | Iterable[str]) -> list[str]:
    """`"llama,mamba"` as a list; `"all"` is every family."""
    names = text.split(",") if isinstance(text, str) else list(text)
    names = [name.strip() for name in names if name.strip()]
    return list(FAMILIES) if names == ["all"] else names
