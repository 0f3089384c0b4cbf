"""The seven native families: what each calls our options, in one table that is read in both directions.

A family is a list of `Pair`s, options that it fixes, and its layer layout. `native_config.py` walks the table from left
to right to import a config and from right to left to export one.
"""

from .native_tables import (
    ATTENTION,
    BIAS,
    HYBRID_MODULES,
    LENGTH,
    LIMIT,
    MAMBA_MODULES,
    MIXTRAL_MODULES,
    NO_BIAS,
    PLAIN,
    PLAIN_ATTENTION,
    PLAIN_MAMBA2,
    PLAIN_MOE,
    SWIGLU,
    TOP,
    TRANSFORMER_MODULES,
    WINDOW,
    Family,
    Pair,
    bamba_layout,
    bamba_layout_options,
    inner_width,
    jamba_layout,
    jamba_layout_options,
    moe,
    rope,
    same,
    uniform,
    write_expand,
)


def _families() -> dict[str, Family]:
    transformer = uniform("attention", "swiglu")
    families = (
        Family(
            "llama",
            "LlamaForCausalLM",
            *transformer,
            pairs=(
                *TOP,
                LENGTH,
                same("rms_norm_eps", "norm.eps"),
                *ATTENTION,
                BIAS,
                rope(),
                *SWIGLU,
                same("mlp_bias", "swiglu.bias"),
            ),
            fixed=PLAIN | PLAIN_ATTENTION,
            modules=TRANSFORMER_MODULES,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            *transformer,
            pairs=(*TOP, LENGTH, same("rms_norm_eps", "norm.eps"), *ATTENTION, WINDOW, rope(), *SWIGLU),
            fixed=PLAIN | PLAIN_ATTENTION | NO_BIAS | {"swiglu.bias": False},
            modules=TRANSFORMER_MODULES,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            *uniform("attention", "moe"),
            pairs=(
                *TOP,
                LENGTH,
                same("rms_norm_eps", "norm.eps"),
                *ATTENTION,
                WINDOW,
                rope(),
                inner_width("moe.intermediate_size"),
                same("hidden_act", "moe.activation"),
                *moe("num_local_experts"),
            ),
            fixed=PLAIN | PLAIN_ATTENTION | NO_BIAS | PLAIN_MOE | {"moe.renormalize": True},
            refused={"router_jitter_noise": (0, None)},
            modules=MIXTRAL_MODULES,
        ),
        _jamba(),
        _mamba(),
        _mamba2(),
        _bamba(),
    )
    return {family.model_type: family for family in families}


def _jamba() -> Family:
    return Family(
        "jamba",
        "JambaForCausalLM",
        jamba_layout,
        jamba_layout_options,
        pairs=(
            *TOP,
            LENGTH,
            same("rms_norm_eps", "norm.eps", "mamba.norm_eps"),
            *ATTENTION,
            inner_width("swiglu.intermediate_size", "moe.intermediate_size"),
            same("hidden_act", "swiglu.activation", "moe.activation", "mamba.activation"),
            *moe("num_experts"),
            same("mamba_d_state", "mamba.state_size"),
            same("mamba_d_conv", "mamba.conv_kernel"),
            Pair("mamba_expand", ("mamba.expand",), write=write_expand),
            same("mamba_dt_rank", "mamba.dt_rank"),
            same("mamba_conv_bias", "mamba.conv_bias"),
            same("mamba_proj_bias", "mamba.bias"),
        ),
        fixed=PLAIN
        | PLAIN_ATTENTION
        | NO_BIAS
        | PLAIN_MOE
        | {
            "attention.position": {"name": "none"},
            "moe.renormalize": False,
            "swiglu.bias": False,
            "mamba.inner_norms": True,
        },
        modules=HYBRID_MODULES,
    )


def _mamba() -> Family:
    return Family(
        "mamba",
        "MambaForCausalLM",
        *uniform("mamba", None),
        pairs=(
            *TOP,
            same("layer_norm_epsilon", "norm.eps"),
            same("state_size", "mamba.state_size"),
            same("conv_kernel", "mamba.conv_kernel"),
            Pair("expand", ("mamba.expand",), write=write_expand),
            same("time_step_rank", "mamba.dt_rank"),
            same("use_conv_bias", "mamba.conv_bias"),
            same("use_bias", "mamba.bias"),
            same("hidden_act", "mamba.activation"),
            same("time_step_min", "mamba.dt_min"),
            same("time_step_max", "mamba.dt_max"),
            same("time_step_floor", "mamba.dt_init_floor"),
        ),
        fixed=PLAIN | {"mamba.inner_norms": False},
        modules=MAMBA_MODULES,
    )


def _mamba2() -> Family:
    return Family(
        "mamba2",
        "Mamba2ForCausalLM",
        *uniform("mamba2", None),
        pairs=(
            *TOP,
            same("layer_norm_epsilon", "norm.eps", "mamba2.norm_eps"),
            same("state_size", "mamba2.state_size"),
            same("head_dim", "mamba2.head_dim"),
            same("num_heads", "mamba2.num_heads"),
            same("expand", "mamba2.expand"),
            same("n_groups", "mamba2.num_groups"),
            same("conv_kernel", "mamba2.conv_kernel"),
            same("use_conv_bias", "mamba2.conv_bias"),
            same("use_bias", "mamba2.bias"),
            same("hidden_act", "mamba2.activation"),
            same("time_step_min", "mamba2.dt_min"),
            same("time_step_max", "mamba2.dt_max"),
            same("time_step_floor", "mamba2.dt_init_floor"),
            LIMIT,
        ),
        fixed=PLAIN | PLAIN_MAMBA2,
        modules=MAMBA_MODULES,
    )


def _bamba() -> Family:
    return Family(
        "bamba",
        "BambaForCausalLM",
        bamba_layout,
        bamba_layout_options,
        pairs=(
            *TOP,
            LENGTH,
            same("rms_norm_eps", "norm.eps", "mamba2.norm_eps"),
            *ATTENTION,
            BIAS,
            rope(partial=True),
            inner_width("swiglu.intermediate_size"),
            same("hidden_act", "swiglu.activation", "mamba2.activation"),
            same("mlp_bias", "swiglu.bias"),
            same("mamba_d_state", "mamba2.state_size"),
            same("mamba_d_head", "mamba2.head_dim"),
            same("mamba_n_heads", "mamba2.num_heads"),
            same("mamba_expand", "mamba2.expand"),
            same("mamba_n_groups", "mamba2.num_groups"),
            same("mamba_d_conv", "mamba2.conv_kernel"),
            same("mamba_conv_bias", "mamba2.conv_bias"),
            same("mamba_proj_bias", "mamba2.bias"),
            LIMIT,
        ),
        fixed=PLAIN | PLAIN_ATTENTION | PLAIN_MAMBA2,
        refused={"z_loss_coefficient": (0, None)},
        modules=HYBRID_MODULES,
    )


FAMILIES: dict[str, Family] = _families()
