"""Seeded tiny native models in every option that the seven families have: no bias is zero, no norm is one."""

import importlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDTH = {"intermediate_size": 48}
TRANSFORMER = SIZES | ATTENTION | WIDTH | {"rms_norm_eps": 3e-3, "max_position_embeddings": 64}
MAMBA = SIZES | {"state_size": 5, "layer_norm_epsilon": 3e-3}
MAMBA2 = MAMBA | {"head_dim": 16, "num_heads": 4, "n_groups": 1}
JAMBA = TRANSFORMER | {
    **{"num_hidden_layers": 5, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 5},
    **{"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4},
}
BAMBA = TRANSFORMER | {
    **{"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 5, "mamba_d_head": 16},
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_ALL = YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}


@dataclass(frozen=True)
class Twin:
    """A native config by its family and options."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32, attn_implementation: str = "eager") -> PreTrainedModel:
        """The native causal LM with random weights, in eval mode."""
        config = CONFIG_MAPPING[self.family](**self.options)
        config._attn_implementation = attn_implementation
        config._experts_implementation = "eager"  # the grouped product has no float64
        module = importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")
        model = getattr(module, config.__class__.__name__.replace("Config", "ForCausalLM"))(config)
        randomize(model)
        normalise_groups_apart(model)
        return model.to(dtype).eval()


TWINS = {
    "llama": Twin("llama", TRANSFORMER),
    "llama-bias-tied": Twin(
        "llama", TRANSFORMER | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "llama-mha-head_dim": Twin("llama", TRANSFORMER | {"num_key_value_heads": None, "head_dim": 12}),
    "llama-mqa-gelu": Twin("llama", TRANSFORMER | {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-theta": Twin("llama", TRANSFORMER | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
    "llama-linear": Twin("llama", TRANSFORMER | {"rope_parameters": LINEAR}),
    "llama-yarn": Twin("llama", TRANSFORMER | {"rope_parameters": YARN}),
    "llama-yarn-all": Twin("llama", TRANSFORMER | {"rope_parameters": YARN_ALL}),
    "llama-llama3": Twin("llama", TRANSFORMER | {"rope_parameters": LLAMA3}),
    "mistral": Twin("mistral", TRANSFORMER | {"sliding_window": 5}),
    "mistral-full-tied": Twin("mistral", TRANSFORMER | {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral-head_dim": Twin("mistral", TRANSFORMER | {"head_dim": 6, "sliding_window": 1}),
    "mixtral": Twin("mixtral", TRANSFORMER | {"num_local_experts": 4, "router_aux_loss_coef": 0.03}),
    "mixtral-window": Twin(
        "mixtral",
        TRANSFORMER
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 4, "tie_word_embeddings": True}
        | {"head_dim": 10, "output_router_logits": True, "hidden_act": "gelu"},
    ),
    "jamba": Twin("jamba", JAMBA),
    "jamba-dense": Twin("jamba", JAMBA | {"num_experts": 1, "tie_word_embeddings": True}),
    "jamba-bias": Twin(
        "jamba",
        JAMBA
        | {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 7}
        | {"num_experts_per_tok": 1, "output_router_logits": True, "router_aux_loss_coef": 0.02},
    ),
    "jamba-no-attention": Twin("jamba", JAMBA | {"attn_layer_period": 9, "attn_layer_offset": 8}),
    "mamba": Twin("mamba", MAMBA),
    "mamba-untied-bias": Twin(
        "mamba", MAMBA | {"tie_word_embeddings": False, "use_bias": True, "residual_in_fp32": False, "conv_kernel": 3}
    ),
    "mamba-narrow": Twin(
        "mamba",
        MAMBA
        | {"use_conv_bias": False, "hidden_act": "gelu", "expand": 1, "time_step_rank": 5}
        | {"time_step_min": 0.01, "time_step_scale": 0.5},
    ),
    "mamba2": Twin("mamba2", MAMBA2),
    "mamba2-groups": Twin(
        "mamba2",
        MAMBA2
        | {"n_groups": 2, "use_bias": True, "tie_word_embeddings": True, "residual_in_fp32": False, "chunk_size": 4}
        | {"hidden_act": "gelu"}
        | {"time_step_limit": (0.3, 0.8)},
    ),
    "mamba2-heads": Twin(
        "mamba2", MAMBA2 | {"num_heads": 12, "head_dim": 8, "expand": 3, "n_groups": 3, "use_conv_bias": False}
    ),
    "bamba": Twin("bamba", BAMBA),
    "bamba-bias-tied": Twin(
        "bamba",
        BAMBA
        | {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "tie_word_embeddings": True}
        | {"mamba_n_groups": 2, "mamba_chunk_size": 4, "time_step_limit": (0.2, 0.9), "attn_layer_indices": [0, 2]},
    ),
    "bamba-rope": Twin(
        "bamba",
        BAMBA
        | {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.25}, "mamba_conv_bias": False, "mamba_expand": 1}
        | {"mamba_d_head": 8, "num_key_value_heads": None},
    ),
    "bamba-no-attention": Twin("bamba", BAMBA | {"attn_layer_indices": None}),
}


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Draw every parameter: weights that keep the scale, norms near 1, biases and decays away from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            value = 0.7 * noise
        elif name.endswith(("dt_proj.bias", "dt_bias")):
            value = 0.5 * noise - 0.5
        elif name.endswith((".D", "norm.weight", "norm_f.weight")):
            value = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed" in name:
            value = noise
        else:
            value = 0.7 * noise / parameter[0].numel() ** 0.5 if name.count("experts") == 0 else 0.12 * noise
        parameter.copy_(value)


FAMILIES = ("llama", "mistral", "mixtral", "jamba", "mamba", "mamba2", "bamba")


def normalise_groups_apart(model: PreTrainedModel) -> None:
    """Let each group of a gated norm be normalised on its own, as mamba-ssm and later versions do and 5.17 does not."""
    groups = getattr(model.config, "n_groups", getattr(model.config, "mamba_n_groups", 1))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNormGated") and not hasattr(module, "group_size"):
            module.forward = partial(_grouped_norm, module, groups)


def _grouped_norm(norm: nn.Module, groups: int, hidden_states: Tensor, gate: Tensor) -> Tensor:
    gated = (hidden_states.float() * nn.functional.silu(gate.float())).unflatten(-1, (groups, -1))
    gated = nn.functional.rms_norm(gated, gated.shape[-1:], eps=norm.variance_epsilon).flatten(-2)
    return norm.weight * gated.to(hidden_states.dtype)
