"""The models that the contract tests run on: every option of every registered part, small enough to be quick."""

from functools import lru_cache
from itertools import combinations, product
from random import Random

import torch

from hybridlm import CHANNEL_MIXERS, MIXERS, HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.registry import PLACEMENTS
from hybridlm.testing import Subject, scale_weights

VOCAB_SIZE = 31
ROPE = {"name": "rope", "theta": 100.0}
ATTENTION = {"name": "attention", "num_heads": 4, "num_kv_heads": 2, "position": ROPE}
WINDOW = ATTENTION | {"window": 5}
CONVOLVED = ATTENTION | {"conv_kernel": 3}
MAMBA = {"name": "mamba", "state_size": 4}
MAMBA2 = {"name": "mamba2", "state_size": 4, "head_dim": 8, "chunk_size": 4}
# a learning rate far above the stable one, so that 37 tokens leave a memory that matters
MEMORY = {"name": "neural_memory", "num_heads": 2, "head_dim": 4, "chunk_size": 5, "conv_kernel": 3}
MEMORY |= {"max_learning_rate": 6.0, "max_gradient": 3.0, "max_curvature": 2.0}
MEMORIZING = {"name": "memorizing", "num_heads": 4, "num_kv_heads": 2, "position": ROPE}
MEMORIZING |= {"window": 3, "memory_size": 7, "top_k": 4}
XL = {"name": "transformer_xl", "num_heads": 4, "segment_size": 4, "memory_size": 3}
# gentler where attention feeds the memory, or the memory attention: rounding to bfloat16 must not grow
NESTED = {key: value for key, value in MEMORY.items() if key != "chunk_size"} | {"max_learning_rate": 2.0}
MAC = ATTENTION | {"name": "titans_mac", "segment_size": 4, "num_persistent": 2, "memory": NESTED}
MAC |= {"attention_residual": False}  # so that what the memory says is not small beside the token itself
MAG = WINDOW | {"name": "titans_mag", "num_persistent": 2}
MAG |= {"memory": MEMORY | {"chunk_size": 4, "max_learning_rate": 8.0}}
MAL = MAG | {"name": "titans_mal"}
MAL |= {"memory": MEMORY | {"chunk_size": 4, "max_learning_rate": 5.0, "memory_expansion": 3.0}}
# options that make a registered part small; a part that is not named here runs with its defaults, a little wider
SMALL = {
    "attention": ATTENTION,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "ema_memory": {"name": "ema_memory"},
    "neural_memory": MEMORY,
    "memorizing": MEMORIZING,
    "titans_mac": MAC,
    "titans_mag": MAG,
    "titans_mal": MAL,
    "transformer_xl": XL,
    "mlp": {"name": "mlp", "intermediate_size": 24},
    "swiglu": {"name": "swiglu", "intermediate_size": 24},
    "moe": {"name": "moe", "num_experts": 4, "intermediate_size": 12},
}


def small(name):
    return SMALL.get(name, {"name": name})


def rope(**scaling):
    return ATTENTION | {"position": ROPE | {"scaling": scaling}}


MIXER_VARIANTS = {
    **{name: small(name) for name in MIXERS},
    "attention-no_position": ATTENTION | {"position": {"name": "none"}},
    "attention-multi_head": ATTENTION | {"num_kv_heads": 4},
    "attention-multi_query": ATTENTION | {"num_kv_heads": 1},
    "attention-wide_heads": ATTENTION | {"head_dim": 6, "scale": 0.3},
    "attention-window": WINDOW,
    "attention-window_of_one": WINDOW | {"window": 1},
    "attention-window_and_sinks": WINDOW | {"num_sinks": 2},
    "attention-window_and_one_sink": WINDOW | {"num_sinks": 1, "position": {"name": "none"}},
    "attention-more_sinks_than_window": WINDOW | {"window": 2, "num_sinks": 4},
    "attention-qk_norm": ATTENTION | {"qk_norm": True},
    "attention-output_gate": ATTENTION | {"output_gate": True},
    "attention-logit_softcap": ATTENTION | {"logit_softcap": 2.0},
    "attention-learned_sinks": ATTENTION | {"learned_sinks": True},
    "attention-biases": ATTENTION | {"qkv_bias": True, "out_bias": True},
    "attention-everything": WINDOW
    | {"num_sinks": 2, "qk_norm": True, "output_gate": True, "logit_softcap": 3.0, "learned_sinks": True}
    | {"qkv_bias": True, "out_bias": True},
    "attention-convolution": CONVOLVED,
    "attention-convolution_and_norms": ATTENTION
    | {"conv_kernel": 4, "qk_norm": True, "qkv_bias": True, "num_kv_heads": 1, "position": {"name": "none"}},
    "attention-window_and_convolution": WINDOW | {"conv_kernel": 4, "num_sinks": 1},
    "attention-window_of_two_and_convolution": WINDOW | {"conv_kernel": 2, "window": 2, "num_kv_heads": 4},
    "attention-rope_partial": ATTENTION | {"position": ROPE | {"partial_rotary_factor": 0.5}},
    "attention-rope_linear": rope(rope_type="linear", factor=4.0),
    "attention-rope_yarn": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
    "attention-rope_llama3": rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "attention-rope_dynamic": rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16, length=64),
    "ema_memory-short": {"name": "ema_memory", "decay_min": 0.3, "decay_max": 0.7},
    "mamba-inner_norms": MAMBA | {"inner_norms": True},
    "mamba-biases": MAMBA | {"bias": True, "conv_bias": False},
    "mamba-sizes": MAMBA | {"intermediate_size": 20, "dt_rank": 3, "conv_kernel": 2},
    "mamba-no_convolution": MAMBA | {"conv_kernel": 1},
    "mamba-activation": MAMBA | {"activation": "gelu"},
    "mamba2-groups": MAMBA2 | {"num_groups": 2},
    "mamba2-no_norm": MAMBA2 | {"gate_norm": False},
    "mamba2-norm_before_gate": MAMBA2 | {"norm_before_gate": True, "num_groups": 2},
    "mamba2-step_limits": MAMBA2 | {"dt_limit_min": 0.3, "dt_limit_max": 0.5},
    "mamba2-biases": MAMBA2 | {"bias": True, "conv_bias": False},
    "mamba2-sizes": MAMBA2 | {"num_heads": 3, "conv_kernel": 2, "chunk_size": 64},
    "mamba2-no_convolution": MAMBA2 | {"conv_kernel": 1, "chunk_size": 1},
    "neural_memory-linear": MEMORY | {"memory_depth": 1, "forget_to": "zero"},
    "neural_memory-deep": MEMORY | {"memory_depth": 4, "memory_bias": True, "memory_activation": "silu"},
    "neural_memory-ttt": MEMORY
    | {"memory_residual": True, "momentum": False, "forgetting": False, "memory_bias": True},
    "neural_memory-token_chunks": MEMORY
    | {"chunk_size": 1, "conv_kernel": 1, "output_gate": False, "max_learning_rate": 4.0},
    "neural_memory-omega": MEMORY
    | {"omega_window": 4, "objective": "huber", "objective_threshold": 0.5, "max_learning_rate": 20.0},
    "neural_memory-atlas": MEMORY | {"omega_window": 2, "optimizer": "muon", "max_learning_rate": 2.0},
    "neural_memory-moneta": MEMORY | {"objective": "lp", "retention": "lq", "normalize_values": False},
    "neural_memory-memora": MEMORY
    | {"retention": "kl", "retention_q": 4.0, "momentum": False, "objective": "kl", "objective_threshold": 0.2}
    | {"max_learning_rate": 30.0},
    "neural_memory-elastic_net": MEMORY | {"retention": "elastic_net", "memory_depth": 1, "objective": "dot"},
    "neural_memory-unbounded": MEMORY | {"max_gradient": None, "max_curvature": None, "max_learning_rate": 3.0},
    "neural_memory-detached": MEMORY | {"detach_memory": True, "output_norm": False},
    "memorizing-all_of_the_store": MEMORIZING | {"top_k": 7, "position": {"name": "none"}},
    "memorizing-no_detach": MEMORIZING | {"detach_memory": False, "memory_size": 5, "top_k": 2},
    "memorizing-multi_query": MEMORIZING | {"num_kv_heads": 1, "head_dim": 6, "top_k": 4, "window": 2},
    "memorizing-long_store": MEMORIZING | {"memory_size": 40, "top_k": 3, "gate_init": 1.0, "scale_init": 4.0},
    "titans_mac-omega": MAC
    | {"memory": NESTED | {"omega_window": 4, "objective": "huber", "max_learning_rate": 6.0, "forget_to": "zero"}},
    "titans_mac-atlas": MAC | {"memory": NESTED | {"omega_window": 2, "optimizer": "muon", "max_learning_rate": 0.7}},
    "titans_mac-linear": MAC | {"memory": NESTED | {"memory_depth": 1, "momentum": False}},
    "titans_mac-retention": MAC
    | {"memory": NESTED | {"objective": "lp", "retention": "lq", "output_gate": False, "max_learning_rate": 3.0}},
    "titans_mac-detached": MAC | {"memory": NESTED | {"detach_memory": True, "conv_kernel": 1}},
    "titans_mac-segment_of_one": MAC
    | {"segment_size": 1, "position": {"name": "none"}, "memory": NESTED | {"max_learning_rate": 1.2}},
    "titans_mac-nothing_persistent": MAC
    | {"num_persistent": 0, "qk_norm": True, "head_dim": 6, "segment_size": 4, "num_kv_heads": 4},
    "titans_mac-residual": MAC | {"attention_residual": True},
    "titans_mag-atlas": MAG | {"memory": MEMORY | {"omega_window": 2, "optimizer": "muon", "max_learning_rate": 2.0}},
    "titans_mag-nothing_persistent": MAG | {"num_persistent": 0, "qk_norm": True, "head_dim": 6},
    "titans_mag-detached": MAG | {"memory": MAG["memory"] | {"chunk_size": 5, "detach_memory": True}, "window": 2},
    "titans_mal-linear": MAL | {"memory": MAL["memory"] | {"memory_depth": 1}, "num_kv_heads": 1},
    "titans_mal-nothing_persistent": MAL
    | {"num_persistent": 0, "qk_norm": True, "memory": MAL["memory"] | {"max_learning_rate": 2.0}},
    "transformer_xl-no_detach": XL | {"detach_memory": False},
    "transformer_xl-long_memory": XL | {"memory_size": 11, "head_dim": 3},
    "transformer_xl-no_memory": XL | {"memory_size": 0, "segment_size": 5},
    "transformer_xl-moving_window": XL | {"segment_size": 1, "memory_size": 5, "detach_memory": False},
}

CHANNEL_VARIANTS = {
    **{name: small(name) for name in CHANNEL_MIXERS},
    "mlp-bias": small("mlp") | {"bias": True, "activation": "relu2"},
    "swiglu-bias": small("swiglu") | {"bias": True, "activation": "gelu"},
    "moe-losses": small("moe") | {"load_balancing_coef": 0.5, "z_loss_coef": 0.1},
    "moe-not_renormalized": small("moe") | {"renormalize": False, "scaling_factor": 2.0},
    "moe-sigmoid": small("moe") | {"scores": "sigmoid", "selection_bias": True, "load_balancing_coef": 0.5},
    "moe-groups": small("moe") | {"num_groups": 2, "top_k_groups": 1, "scores": "sigmoid", "selection_bias": True},
    "moe-shared": small("moe") | {"num_shared_experts": 2, "shared_gate": True},
    "moe-zero_and_copy": small("moe") | {"num_zero_experts": 1, "num_copy_experts": 2, "load_balancing_coef": 0.5},
    "moe-switch": small("moe") | {"routing": "switch"},
    "moe-gshard": small("moe") | {"routing": "gshard", "second_expert": "always", "z_loss_coef": 0.1},
    "moe-hash": small("moe") | {"routing": "hash", "z_loss_coef": 0.1},
    "moe-one_of_three": small("moe") | {"num_experts": 3, "top_k": 1, "implementation": "loop"},
}

LAYER_SCALE = {"name": "add", "layer_scale": 0.7, "multiplier": 0.5}
# options that make a registered residual with streams small
STREAMS = {
    "hyper_connections": {"name": "hyper_connections", "num_streams": 3},
    "manifold_hyper_connections": {"name": "manifold_hyper_connections", "num_streams": 3, "sinkhorn_iterations": 5},
}
HYPER, MANIFOLD = STREAMS.values()
RESIDUAL_OPTIONS = {"plain": {"name": "add"}, "layer_scale": LAYER_SCALE, **STREAMS}
STRUCTURES = {
    **{
        f"{name}-{placement}": {"norm": {"name": name, "placement": placement}}
        for name, placement in product(("rms", "layer"), PLACEMENTS)
    },
    "rms-offset": {"norm": {"name": "rms", "offset": True, "eps": 1e-3}},
    "layer-offset_without_bias": {"norm": {"name": "layer", "offset": True, "bias": False}},
    "layer_scale": {"residual": LAYER_SCALE},
    "layer_scale-post": {"residual": LAYER_SCALE, "norm": {"name": "rms", "placement": "post"}},
    **{
        f"{name}-sandwich": {"residual": spec, "norm": {"name": "rms", "placement": "sandwich"}}
        for name, spec in STREAMS.items()
    },
    "hyper_connections-static": {"residual": HYPER | {"dynamic": False, "multiplier": 0.5}},
    "hyper_connections-no_tanh": {"residual": HYPER | {"tanh": False, "layer_scale": 0.7}},
    "hyper_connections-one": {"residual": HYPER | {"num_streams": 1}},
    "manifold_hyper_connections-two": {"residual": MANIFOLD | {"num_streams": 2, "layer_scale": 0.7}},
    "manifold_hyper_connections-one": {"residual": MANIFOLD | {"num_streams": 1, "multiplier": 0.5}},
    "multipliers": {"embedding_multiplier": 3.0, "logit_multiplier": 0.5},
    "tied": {"tie_word_embeddings": True},
}


def build(layers, **fields):
    """A scaled float64 model: `layers` are `(mixer, channel_mixer)` entries, either may be `None`."""
    recipes = {f"r{i}": {"mixer": mixer, "channel_mixer": channel} for i, (mixer, channel) in enumerate(layers)}
    parts = [part["name"] for layer in layers for part in layer if part is not None]
    config = HybridLMConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=fields.pop("hidden_size", 16 if all(name in SMALL for name in parts) else 64),
        num_hidden_layers=len(layers),
        layer_specs=recipes,
        layer_layout=list(recipes),
        **fields,
    )
    return scale_weights(HybridLMForCausalLM(config)).double()


@lru_cache(maxsize=8)
def mixer_subject(name, dtype=torch.float64):
    """Two layers of one mixer, one of them with a channel mixer."""
    mixer = MIXER_VARIANTS[name]
    return Subject(build([(mixer, small("mlp")), (mixer, None)]).to(dtype))


@lru_cache(maxsize=8)
def channel_subject(name):
    """A channel mixer behind a mixer, and alone in its layer."""
    channel = CHANNEL_VARIANTS[name]
    return Subject(build([(MAMBA, channel), (None, channel)]))


@lru_cache(maxsize=8)
def structure_subject(name):
    """Attention and Mamba under the norms, residuals and multipliers of an entry of `STRUCTURES`."""
    return Subject(build([(MAMBA, small("mlp")), (ATTENTION, small("swiglu"))], **STRUCTURES[name]))


def gentle(mixer):
    """The mixer where rounding neither grows nor chooses: memories with their default learning rate, all neighbours."""
    if "top_k" in mixer:
        return mixer | {"top_k": mixer["memory_size"]}
    if "max_learning_rate" in mixer:
        return mixer | {"max_learning_rate": 1.0}
    return mixer | {"memory": gentle(mixer["memory"])} if mixer.get("memory") else mixer


# four layers each: in a model as deep as there are mixers, rounding to bfloat16 adds up
TRIOS = ["-".join(list(MIXERS)[i : i + 3]) for i in range(0, len(MIXERS), 3)]


@lru_cache(maxsize=8)
def hybrid_subject(dtype=torch.float64, residual="plain", trio=None):
    """Every mixer and experts with losses in one model, or three mixers without what rounding sends elsewhere."""
    mixers = [small(name) for name in MIXERS] if trio is None else [gentle(small(name)) for name in trio.split("-")]
    mixers.append(WINDOW | {"num_sinks": 2})
    channels = [None, CHANNEL_VARIANTS["moe-losses"] if trio is None else small("mlp")]
    layers = [(mixer, channels[i % 2]) for i, mixer in enumerate(mixers)]
    return Subject(build(layers, residual=RESIDUAL_OPTIONS[residual]).to(dtype))


def pair(a, x, b, y):
    """The pair of two factors' values, the same whichever comes first; "mixer 1" and "mixer 2" are both mixers."""
    return tuple(sorted(((a.split()[0], x), (b.split()[0], y)), key=repr))


def pairs_of(row):
    """Every pair of values in a row."""
    return {pair(a, row[a], b, row[b]) for a, b in combinations(row, 2)}


def every_pair(factors, impossible=()):
    """Every pair that two factors' values may make."""
    return {
        pair(a, x, b, y)
        for a, b in combinations(factors, 2)
        for x, y in product(factors[a], factors[b])
        if {a: x, b: y} not in impossible
    }


def pairwise(factors, impossible=(), seed=0):
    """Rows that together hold every pair of values of every two factors.

    Args:
        factors: Factor name to its values; names with the same first word stand for parts of one kind.
        impossible: Pairs `{factor: value, other factor: value}` that no model may have.
        seed: Breaks ties.

    Returns:
        A list of `{factor: value}`, found greedily: each row is the best of some random ones.
    """
    rng, rows, missing = Random(seed), [], every_pair(factors, impossible)

    def candidate(wanted):
        row = {name: rng.choice(list(values)) for name, values in factors.items()}
        (kind, x), (other, y) = rng.sample(wanted, 2)
        first = rng.choice([name for name in factors if name.split()[0] == kind and x in factors[name]])
        second = [name for name in factors if name != first and name.split()[0] == other and y in factors[name]]
        return row | {first: x} | ({rng.choice(second): y} if second else {})

    def possible(row):
        return not any(pair.items() <= row.items() for pair in impossible)

    while missing:
        wanted = min(missing, key=repr)
        candidates = [candidate(wanted) for _ in range(200)]
        rows.append(max(filter(possible, candidates), key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows


FACTORS = {
    "mixer 1": [*MIXERS, "attention-window_and_sinks"],
    "mixer 2": [*MIXERS, "attention-window_and_sinks"],
    "mixer 3": [*MIXERS, "attention-window_and_sinks"],
    "channel": [*CHANNEL_MIXERS, "moe-losses", "none"],
    "position": ["none", "rope", "yarn"],
    "norm": ["rms", "layer"],
    "placement": list(PLACEMENTS),
    "tied": [False, True],
    "residual": list(RESIDUAL_OPTIONS),
}
POSITIONS = {
    "none": {"name": "none"},
    "rope": ROPE,
    "yarn": MIXER_VARIANTS["attention-rope_yarn"]["position"],
}
IMPOSSIBLE = [{"placement": "post", "residual": name} for name in STREAMS]
PAIRWISE = {"-".join(str(value) for value in row.values()): row for row in pairwise(FACTORS, IMPOSSIBLE)}


@lru_cache(maxsize=4)
def pairwise_subject(name):
    """A mixer with a channel mixer, two others, and attention with a position and a convolution."""
    row = PAIRWISE[name]
    channel = None if row["channel"] == "none" else CHANNEL_VARIANTS[row["channel"]]
    last = CONVOLVED | {"position": POSITIONS[row["position"]]}
    layers = [(MIXER_VARIANTS[row[f"mixer {i}"]], channel if i == 1 else None) for i in (1, 2, 3)] + [(last, None)]
    return Subject(
        build(
            layers,
            norm={"name": row["norm"], "placement": row["placement"]},
            residual=RESIDUAL_OPTIONS[row["residual"]],
            tie_word_embeddings=row["tied"],
        )
    )
