"""Bad input to the config and to `forward`: a clear error that names the field, and a cache that is as it was."""

import math
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import DynamicCache
from variants import ATTENTION, MAMBA, MAMBA2, VOCAB_SIZE, WINDOW, build, hybrid_subject, mixer_subject, small

from hybridlm import MIXERS, HybridLMConfig, HybridLMForCausalLM
from hybridlm.testing import Subject

MOE = small("moe")


def config(mixer=MAMBA, channel=None, **fields):
    fields = {"hidden_size": 16, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 1} | fields
    return HybridLMConfig(layer_specs={"a": {"mixer": mixer, "channel_mixer": channel}}, **fields)


WRONG_PARTS = [
    ({"name": "mambo"}, f"layer_specs.a.mixer.name: unknown 'mambo', expected one of {sorted(MIXERS)}"),
    ("mamba", "layer_specs.a.mixer: expected a part such as"),
    ({"state_size": 4}, "layer_specs.a.mixer: expected a part such as"),
    (MAMBA | {"state_siz": 4}, "layer_specs.a.mixer: unknown option 'state_siz', expected one of ["),
    (MAMBA | {"placement": "pre"}, "layer_specs.a.mixer: unknown option 'placement'"),
    (MAMBA | {"state_size": "4"}, "layer_specs.a.mixer.state_size: expected int, got '4' (str)"),
    (MAMBA | {"state_size": 4.0}, "layer_specs.a.mixer.state_size: expected int, got 4.0 (float)"),
    (MAMBA | {"state_size": True}, "layer_specs.a.mixer.state_size: expected int, got True (bool)"),
    (MAMBA | {"norm_eps": True}, "layer_specs.a.mixer.norm_eps: expected float, got True (bool)"),
    (MAMBA | {"inner_norms": 1}, "layer_specs.a.mixer.inner_norms: expected bool, got 1 (int)"),
    (MAMBA | {"state_size": 0}, "layer_specs.a.mixer.state_size=0 must be at least 1"),
    (MAMBA | {"conv_kernel": 0}, "layer_specs.a.mixer.conv_kernel=0 must be at least 1"),
    (MAMBA | {"dt_min": 0.2}, "layer_specs.a.mixer.dt_min=0.2 must be above 0 and at most dt_max=0.1"),
    (MAMBA | {"activation": "sillu"}, "layer_specs.a.mixer.activation"),
    (MAMBA2 | {"head_dim": 5}, "layer_specs.a.mixer.head_dim=5 must divide"),
    (MAMBA2 | {"num_groups": 3}, "layer_specs.a.mixer.num_groups=3 must divide num_heads=4"),
    (MAMBA2 | {"dt_limit_min": 1.0, "dt_limit_max": 0.5}, "layer_specs.a.mixer.dt_limit_min=1.0"),
    (ATTENTION | {"num_heads": 3, "num_kv_heads": 1}, "layer_specs.a.mixer.num_heads=3 must divide hidden_size=16"),
    (ATTENTION | {"num_kv_heads": 3}, "layer_specs.a.mixer.num_kv_heads=3 must divide num_heads=4"),
    (ATTENTION | {"num_heads": 0}, "layer_specs.a.mixer.num_heads=0"),
    (ATTENTION | {"head_dim": -2}, "layer_specs.a.mixer.head_dim=-2 must be positive"),
    (ATTENTION | {"window": 0}, "layer_specs.a.mixer.window=0 must be at least 1"),
    (ATTENTION | {"window": -3}, "layer_specs.a.mixer.window=-3 must be at least 1"),
    (ATTENTION | {"num_sinks": 2}, "layer_specs.a.mixer.num_sinks=2 must be at least 0, and needs a window"),
    (WINDOW | {"num_sinks": -1}, "layer_specs.a.mixer.num_sinks=-1"),
    (
        ATTENTION | {"conv_kernel": 0},
        "layer_specs.a.mixer.conv_kernel=0 must be at least 2, or null for no convolution",
    ),
    (ATTENTION | {"conv_kernel": 1}, "layer_specs.a.mixer.conv_kernel=1 must be at least 2"),
    (WINDOW | {"conv_kernel": -1}, "layer_specs.a.mixer.conv_kernel=-1 must be at least 2"),
    (ATTENTION | {"conv_kernel": 1.5}, "layer_specs.a.mixer.conv_kernel: expected int | None, got 1.5 (float)"),
    (ATTENTION | {"logit_softcap": 0.0}, "layer_specs.a.mixer.logit_softcap=0.0 must be positive"),
    (ATTENTION | {"dropout": 1.0}, "layer_specs.a.mixer.dropout=1.0 must lie in [0, 1)"),
    (ATTENTION | {"position": {"name": "alibi"}}, "layer_specs.a.mixer.position.name: unknown 'alibi'"),
    (ATTENTION | {"position": {"name": "rope", "base": 1e4}}, "layer_specs.a.mixer.position: unknown option 'base'"),
    (
        ATTENTION | {"position": {"name": "rope", "partial_rotary_factor": 0.3}},
        "partial_rotary_factor=0.3 of head_dim=4",
    ),
    (
        ATTENTION | {"position": {"name": "rope", "theta": -1.0}},
        "layer_specs.a.mixer.position.theta=-1.0 must be positive",
    ),
    (
        ATTENTION | {"position": {"name": "rope", "scaling": {"rope_type": "yarm"}}},
        "layer_specs.a.mixer.position.scaling.rope_type: unknown 'yarm'",
    ),
    (
        ATTENTION | {"position": {"name": "rope", "scaling": {"rope_type": "yarn", "factor": 2.0}}},
        "layer_specs.a.mixer.position.scaling.original_max_position_embeddings: missing",
    ),
    (
        ATTENTION
        | {
            "position": {
                "name": "rope",
                "scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
            }
        },
        "use 'yarn'",
    ),
]
MEMORY = small("neural_memory")
MAC, MAG, MAL = (small(f"titans_{kind}") for kind in ("mac", "mag", "mal"))
INNER = {"name": "neural_memory", "num_heads": 2}
WRONG_PARTS += [
    (MAC | {"segment_size": 0}, "layer_specs.a.mixer.segment_size=0 must be at least 1"),
    (MAC | {"window": 4}, "layer_specs.a.mixer: unknown option 'window'"),
    (MAG | {"window": 0}, "layer_specs.a.mixer.window=0 must be at least 1"),
    (MAL | {"window": None}, "layer_specs.a.mixer.window: expected int, got None (NoneType)"),
    (MAC | {"num_persistent": -1}, "layer_specs.a.mixer.num_persistent=-1 must be at least 0"),
    (MAG | {"num_persistent": -1}, "layer_specs.a.mixer.num_persistent=-1 must be at least 0"),
    (MAL | {"num_kv_heads": 3}, "layer_specs.a.mixer.num_kv_heads=3 must divide num_heads=4"),
    (MAC | {"memory": {"name": "mamba"}}, "layer_specs.a.mixer.memory.name: unknown 'mamba', expected one of ['neural"),
    (
        MAC | {"memory": {"num_heads": 2}},
        "layer_specs.a.mixer.memory: expected a part such as {'name': 'neural_memory'}",
    ),
    (MAC | {"memory": "neural_memory"}, "layer_specs.a.mixer.memory: expected dict | None, got 'neural_memory' (str)"),
    (MAG | {"memory": INNER | {"depth": 2}}, "layer_specs.a.mixer.memory: unknown option 'depth', expected one of ["),
    (MAG | {"memory": INNER | {"chunk_size": 0}}, "layer_specs.a.mixer.memory.chunk_size=0 must be at least 1"),
    (MAL | {"memory": INNER | {"memory_depth": 0}}, "layer_specs.a.mixer.memory.memory_depth=0 must be at least 1"),
    (MAC | {"memory": INNER | {"optimizer": "adam"}}, "layer_specs.a.mixer.memory.optimizer: unknown 'adam'"),
    (
        MAC | {"memory": INNER | {"chunk_size": 8}},
        "layer_specs.a.mixer.memory.chunk_size=8 must be null or segment_size=4: the memory moves on when a segment",
    ),
]
WRONG_PARTS += [
    (MEMORY | {"chunk_size": 0}, "layer_specs.a.mixer.chunk_size=0 must be at least 1"),
    (MEMORY | {"memory_depth": 0}, "layer_specs.a.mixer.memory_depth=0 must be at least 1"),
    (MEMORY | {"omega_window": 0}, "layer_specs.a.mixer.omega_window=0 must be at least 1"),
    (MEMORY | {"num_heads": 3, "head_dim": None}, "layer_specs.a.mixer.num_heads=3 must divide hidden_size=16"),
    (MEMORY | {"num_heads": 0}, "layer_specs.a.mixer.num_heads=0"),
    (MEMORY | {"head_dim": 0}, "layer_specs.a.mixer.head_dim=0 must be at least 1"),
    (MEMORY | {"conv_kernel": 0}, "layer_specs.a.mixer.conv_kernel=0 must be at least 1"),
    (MEMORY | {"memory_expansion": 0.0}, "layer_specs.a.mixer.memory_expansion=0.0 must give at least one unit"),
    (MEMORY | {"objective": "l1"}, "layer_specs.a.mixer.objective: unknown 'l1', expected one of ["),
    (MEMORY | {"retention": "l2"}, "layer_specs.a.mixer.retention: unknown 'l2', expected one of ["),
    (MEMORY | {"optimizer": "adam"}, "layer_specs.a.mixer.optimizer: unknown 'adam', expected one of ["),
    (
        MEMORY | {"memory_activation": "tanh"},
        "layer_specs.a.mixer.memory_activation: unknown 'tanh', expected one of [",
    ),
    (MEMORY | {"forget_to": "one"}, "layer_specs.a.mixer.forget_to: unknown 'one', expected one of ["),
    (MEMORY | {"min_forgetting": 1.0}, "layer_specs.a.mixer.min_forgetting=1.0 must lie in [0, 1)"),
    (MEMORY | {"min_forgetting": -0.1}, "layer_specs.a.mixer.min_forgetting=-0.1 must lie in [0, 1)"),
    (MEMORY | {"max_learning_rate": -1.0}, "layer_specs.a.mixer.max_learning_rate=-1.0 must be at least 0"),
    (MEMORY | {"max_gradient": 0.0}, "layer_specs.a.mixer.max_gradient=0.0 must be above 0"),
    (MEMORY | {"max_curvature": -1.0}, "layer_specs.a.mixer.max_curvature=-1.0 must be above 0"),
    (MEMORY | {"objective_p": 1.0}, "layer_specs.a.mixer.objective_p=1.0 must be above 1"),
    (MEMORY | {"objective_threshold": 0.0}, "layer_specs.a.mixer.objective_threshold=0.0 must be above 0"),
    (MEMORY | {"retention": "lq", "retention_q": 0.0}, "layer_specs.a.mixer.retention_q=0.0 must be above 0"),
    (
        MEMORY | {"retention": "elastic_net", "retention_q": -1.0},
        "layer_specs.a.mixer.retention_q=-1.0 must be at least",
    ),
    (
        small("ema_memory") | {"decay_max": 1.0},
        "layer_specs.a.mixer.decay_min=0.9 must be above 0 and at most decay_max",
    ),
]
WRONG_CHANNELS = [
    ({"name": "mlb"}, "layer_specs.a.channel_mixer.name: unknown 'mlb', expected one of ['mlp', 'moe', 'swiglu']"),
    (small("mlp") | {"activation": "gelo"}, "layer_specs.a.channel_mixer.activation: unknown 'gelo'"),
    (small("swiglu") | {"intermediate_size": 0}, "layer_specs.a.channel_mixer.intermediate_size=0"),
    (MOE | {"top_k": 5}, "layer_specs.a.channel_mixer.top_k=5 must be between 1 and num_experts=4"),
    (MOE | {"top_k": 0}, "layer_specs.a.channel_mixer.top_k=0 must be between 1 and num_experts=4"),
    (MOE | {"num_groups": 3}, "layer_specs.a.channel_mixer.num_groups=3 must divide num_experts=4"),
    (MOE | {"num_groups": 4, "top_k_groups": 1}, "layer_specs.a.channel_mixer.top_k=2 is more than the 1 experts"),
    (MOE | {"scores": "tanh"}, "layer_specs.a.channel_mixer.scores: unknown 'tanh'"),
    (MOE | {"shared_gate": True}, "layer_specs.a.channel_mixer.shared_gate=True needs num_shared_experts"),
]
MOD = {"name": "mixture_of_depths"}
MERGING = {"name": "token_merging", "start": 0}


def spans(*entries):
    return {"num_hidden_layers": 4, "spans": list(entries)}


WRONG_FIELDS = [
    ({"num_hidden_layers": 2, "layer_layout": ["a"]}, "layer_layout: names 1 layers, expected num_hidden_layers=2"),
    ({"layer_layout": ["b"]}, "layer_layout.0: unknown recipe 'b', expected one of ['a']"),
    ({"norm": {"name": "batch"}}, "norm.name: unknown 'batch'"),
    ({"norm": {"name": "rms", "placement": "mid"}}, "norm.placement: unknown 'mid'"),
    ({"norm": {"name": "rms", "bias": True}}, "norm: unknown option 'bias'"),
    ({"norm": {"name": "rms", "eps": 0.0}}, "norm.eps=0.0 must be above 0"),
    ({"residual": {"name": "highway"}}, "residual.name: unknown 'highway'"),
    ({"residual": {"name": "add", "dropout": 2.0}}, "residual.dropout=2.0 must lie in [0, 1)"),
    (spans({"name": "mixture_of_depths"}), "spans.0.start: is needed"),
    (spans({"name": "mixture_of_depth", "start": 0}), "spans.0.name: unknown 'mixture_of_depth'"),
    (spans(MOD | {"start": 9}), "spans.0.start: 9 is not a layer"),
    (spans(MOD | {"start": 1, "stop": 9}), "spans.0.stop: 9, expected 2 to num_hidden_layers"),
    (spans(MOD | {"start": 1, "stop": 1}), "spans.0.stop: 1, expected 2"),
    (spans(MOD | {"start": 0, "stop": 2, "every": 1}), "spans.0.every: 1 repeats a span of 2 layers into itself"),
    (spans(MOD | {"start": True}), "spans.0.start: expected a whole number, got True"),
    (spans(MOD | {"start": 0, "capacity": 0.0}), "spans.0.capacity=0.0 must lie in (0, 1]"),
    (spans(MOD | {"start": 0, "capacity": 1.5}), "spans.0.capacity=1.5 must lie in (0, 1]"),
    (spans(MOD | {"start": 0, "ceiling": 0.1}), "spans.0.ceiling=0.1 must not be below capacity=0.125"),
    (spans(MOD | {"start": 0, "rule": "top_k"}), "spans.0.rule: unknown 'top_k'"),
    (
        spans(MOD | {"start": 0, "stop": 2}, MOD | {"start": 1, "stop": 3}),
        "spans.1: layers 1 to 2 cross spans.0, layers 0 to 1",
    ),
    (spans(MERGING | {"boundary": "sharp"}), "spans.0.boundary: unknown 'sharp', expected one of"),
    (spans(MERGING | {"representative": "last"}), "spans.0.representative: unknown 'last', expected one of"),
    (spans(MERGING | {"threshold": "0.5"}), "spans.0.threshold: expected float | None, got '0.5' (str)"),
    (spans(MERGING | {"threshold": -1}), "spans.0.threshold=-1 must be above -1"),
    (spans(MERGING | {"target_ratio": 0.5}), "spans.0.target_ratio=0.5 must be at least 1"),
    (spans(MERGING | {"target_ratio": 1, "boundary": "learned"}), "spans.0.target_ratio=1 must be above 1 with"),
    (spans(MERGING | {"boundary": "stride", "stride": 0}), "spans.0.stride=0 must be at least 1"),
    (spans(MERGING | {"stride": 2.5}), "spans.0.stride: expected int | None, got 2.5 (float)"),
    (
        spans(MERGING | {"stride": 4}),
        "spans.0.stride=4 needs boundary='stride'; with boundary='cosine' set target_ratio",
    ),
    (spans(MERGING | {"boundary": "stride", "target_ratio": 4.0}), "spans.0.target_ratio=4.0 must be null with"),
    (spans(MERGING | {"boundary": "stride", "threshold": 0.5}), "spans.0.threshold=0.5 must be null with"),
    (spans(MERGING | {"bias_update_rate": 2.0}), "spans.0.bias_update_rate=2.0 must lie in [0, 1]"),
    (spans(MERGING | {"loss_coef": -1.0}), "spans.0.loss_coef=-1.0 must not be negative"),
    (spans(MERGING | {"ceiling": 0.4}), "spans.0.ceiling=0.4 must not be below 1 / target_ratio, 0.5"),
    (
        spans(MERGING | {"ceiling": 0.6, "boundary": "stride"}),
        "spans.0.ceiling=0.6 must be null with boundary='stride'",
    ),
    (spans(MERGING | {"ceiling": 0.6, "representative": "mean"}), "spans.0.ceiling=0.6 must be null with representat"),
    ({"hidden_size": 0}, "hidden_size: 0, expected at least 1"),
    ({"vocab_size": 0}, "vocab_size: 0, expected at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: 0, expected at least 1"),
    ({"hidden_sizes": 16}, "hidden_sizes: unknown key"),
    ({"num_attention_heads": 4}, "num_attention_heads: follows from layer_specs"),
    ({"sliding_window": 4}, "sliding_window: follows from layer_specs"),
    ({"schema_version": 2}, "schema_version: 2 is newer than 1"),
    ({"schema_version": 0}, "schema_version: 0, expected 1 to 1"),
    ({"initializer_range": "wide"}, "initializer_range"),
    ({"embedding_std": "wide"}, "embedding_std"),
    ({"embedding_std": 0.0}, "embedding_std: 0.0, expected above 0, or null for initializer_range"),
    ({"embedding_std": -0.4}, "embedding_std: -0.4, expected above 0"),
    ({"embedding_std": float("inf")}, "embedding_std: inf, expected above 0"),
    ({"layer_layout": "aa"}, "layer_layout"),
    ({"hidden_size": 16.5}, "hidden_size"),
    ({"embedding_dropout": 1.5}, "embedding_dropout"),
]


def refused(build_it, message):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError)) as caught:
        build_it()
    assert message in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("mixer", "message"), WRONG_PARTS, ids=[m[:70] for _, m in WRONG_PARTS])
def test_a_wrong_mixer_is_refused_by_its_path(mixer, message):
    refused(lambda: HybridLMForCausalLM(config(mixer)), message)


@pytest.mark.parametrize(("channel", "message"), WRONG_CHANNELS, ids=[m[:70] for _, m in WRONG_CHANNELS])
def test_a_wrong_channel_mixer_is_refused_by_its_path(channel, message):
    refused(lambda: HybridLMForCausalLM(config(channel=channel)), message)


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS, ids=[m[:70] for _, m in WRONG_FIELDS])
def test_a_wrong_field_is_refused_by_its_name(fields, message):
    refused(lambda: HybridLMForCausalLM(config(**fields)), message)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({}, "layer_specs: empty"),
        ({"a": {}}, "layer_specs.a: needs a mixer or a channel_mixer"),
        ({"a": {"mixer": None, "channel_mixer": None}}, "layer_specs.a: needs a mixer or a channel_mixer"),
        ({"a": {"mixers": MAMBA}}, "layer_specs.a: unknown key 'mixers'"),
        ({"a": MAMBA}, "layer_specs.a: unknown key 'name'"),
        ({"a": "mamba"}, "layer_specs.a: expected a dictionary"),
        (
            {"a": {"mixer": MAMBA, "norm": {"name": "rms", "epsilon": 1e-6}}},
            "layer_specs.a.norm: unknown option 'epsilon'",
        ),
        ({"a": {"mixer": MAMBA, "norm": {"name": "rms", "eps": -1.0}}}, "layer_specs.a.norm.eps=-1.0"),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_path(specs, message):
    fields = {"hidden_size": 16, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 1}
    refused(lambda: HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, **fields)), message)


# forward ----------------------------------------------------------------------------------------------------------

IDS = torch.randint(0, VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(6).expand(2, -1)
ZEROS = torch.zeros(2, 6, dtype=torch.long)
BORDER = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, -1)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


WRONG_CALLS = {
    "empty_sequence": ({"input_ids": IDS[:, :0]}, "input_ids: expected at least one row and one token"),
    "no_rows": ({"input_ids": IDS[:0]}, "input_ids: expected at least one row and one token"),
    "no_input": ({"input_ids": None}, "input_ids: give exactly one of input_ids and inputs_embeds"),
    "two_inputs": ({"inputs_embeds": torch.zeros(2, 6, 16)}, "input_ids: give exactly one of"),
    "flat_ids": ({"input_ids": IDS[0]}, "input_ids: expected [B, T]"),
    "negative_id": ({"input_ids": IDS - 100}, "is out of range, expected 0 to 30"),
    "large_id": ({"input_ids": IDS + 31}, "is out of range, expected 0 to 30"),
    "empty_embeddings": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 0, 16)},
        "inputs_embeds: expected at least",
    ),
    "flat_embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(6, 16)}, "inputs_embeds: expected [B, T, D]"),
    "narrow_embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 8)}, "inputs_embeds"),
    "short_mask": ({"attention_mask": torch.ones(2, 5)}, "attention_mask: expected shape"),
    "long_mask": ({"attention_mask": torch.ones(2, 40)}, "attention_mask: expected shape"),
    "mask_of_other_rows": ({"attention_mask": torch.ones(3, 6)}, "attention_mask: expected shape"),
    "mask_of_pairs": ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask: expected [batch, tokens]"),
    "short_positions": ({"position_ids": POSITIONS[:, :4]}, "position_ids: expected shape"),
    "flat_positions": ({"position_ids": POSITIONS[0]}, "position_ids: expected shape"),
    "short_seq_idx": ({"seq_idx": ZEROS[:, :4]}, "seq_idx: expected shape"),
    "seq_idx_of_other_rows": ({"seq_idx": torch.zeros(3, 6, dtype=torch.long)}, "seq_idx: expected shape"),
    "lengths_of_two_rows": ({"cu_seq_lens_q": int32(0, 3, 6)}, "cu_seq_lens_q: describes one row"),
    "positions_restart_inside_a_document": (
        {"seq_idx": ZEROS, "position_ids": POSITIONS % 3},
        "position_ids and seq_idx: a position restarts or jumps inside one document",
    ),
}
WRONG_CALLS_OF_ONE_ROW = {
    "lengths_too_short": ({"cu_seq_lens_q": int32(0, 3)}, "cu_seq_lens_q: must rise from 0 to 6"),
    "lengths_too_long": ({"cu_seq_lens_q": int32(0, 3, 7)}, "cu_seq_lens_q: must rise from 0 to 6"),
    "lengths_that_fall": ({"cu_seq_lens_q": int32(0, 4, 2, 6)}, "cu_seq_lens_q: must rise from 0 to 6"),
    "lengths_from_one": ({"cu_seq_lens_q": int32(1, 6)}, "cu_seq_lens_q: must rise from 0 to 6"),
    "borders_that_differ": (
        {"cu_seq_lens_q": int32(0, 2, 6), "seq_idx": BORDER[:1]},
        "seq_idx and cu_seq_lens_q: their document borders differ",
    ),
    "positions_against_lengths": (
        {"cu_seq_lens_q": int32(0, 2, 6), "position_ids": POSITIONS[:1] % 3},
        "position_ids and cu_seq_lens_q: a position restarts or jumps inside one document",
    ),
}
CASES = [pytest.param(case, 2, id=name) for name, case in WRONG_CALLS.items()]
CASES += [pytest.param(case, 1, id=name) for name, case in WRONG_CALLS_OF_ONE_ROW.items()]


def facts(cache):
    """Everything that a cache knows, in a form that can be compared."""
    tensors = {f"{i}.{k}": v.clone() for i, layer in enumerate(cache.layers) for k, v in layer.named_tensors().items()}
    numbers = [cache.get_seq_length(), cache.batch_size, len(cache.stream.calls), cache.recording]
    return tensors, numbers, None if cache.seen_tokens is None else cache.seen_tokens.tolist()


def unchanged(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name


def call(model, arguments, batch, **more):
    arguments = {"input_ids": IDS[:batch]} | arguments | more
    with torch.no_grad():
        return model(**arguments)


@pytest.mark.parametrize(("case", "batch"), CASES)
def test_a_wrong_call_is_refused(case, batch):
    arguments, message = case
    with pytest.raises(ValueError, match=re.escape(message)):
        call(hybrid_subject().model, arguments, batch)


@pytest.mark.parametrize("kind", ["plain", "recording", "static"])
@pytest.mark.parametrize(("case", "batch"), CASES)
def test_a_wrong_call_leaves_the_cache_as_it_was(case, batch, kind):
    subject, (arguments, _) = hybrid_subject(), case
    options = {"static": True, "max_length": 20} if kind == "static" else {}
    cache = subject.recording_cache(6) if kind == "recording" else subject.new_cache(**options)
    subject.forward(IDS[:batch, :3], cache)
    subject.forward(IDS[:batch, 3:4], cache)
    before = facts(cache)
    mask = arguments.get("attention_mask")
    if mask is not None and mask.shape == (2, 6):
        pytest.skip("a mask of the whole stream is as long as this")
    with pytest.raises(ValueError):
        call(subject.model, arguments, batch, past_key_values=cache)
    unchanged(before, facts(cache))
    after = subject.forward(IDS[:batch, 4:], cache)
    assert subject.error(after, subject.forward(IDS[:batch])[:, 4:]) <= 1e-9


@pytest.mark.parametrize(("case", "batch"), CASES)
def test_a_wrong_first_call_leaves_the_cache_empty(case, batch):
    subject, (arguments, _) = hybrid_subject(), case
    cache = subject.new_cache()
    with pytest.raises(ValueError):
        call(subject.model, arguments, batch, past_key_values=cache)
    ids = subject.input_ids  # other rows than the refused call had
    assert subject.error(subject.forward(ids, cache), subject.reference) <= 1e-9


def test_a_row_without_a_real_token_needs_a_cache():
    subject, mask = hybrid_subject(), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ValueError, match="attention_mask: row 1 has no real token"):
        subject.forward(IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask: row 1 has no real token"):
        subject.forward(IDS, attention_mask=mask, use_cache=True)
    logits = subject.forward(IDS, subject.new_cache(), attention_mask=mask)
    assert bool(torch.isfinite(logits).all())


OTHER = {
    "mixer": lambda: build([(MAMBA2, None)]),
    "option": lambda: build([(MAMBA | {"conv_kernel": 2}, None)]),
    "depth": lambda: build([(MAMBA, None), (MAMBA, None)]),
}


@pytest.mark.parametrize("difference", OTHER)
def test_a_cache_of_another_config_is_refused(difference):
    subject, other = Subject(build([(MAMBA, None)])), OTHER[difference]()
    cache = other.new_cache()
    with pytest.raises(ValueError, match="past_key_values: was made for a model with another config"):
        subject.forward(IDS, cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="another config"):
        subject.new_cache().restore(cache)


def test_a_cache_of_another_library_is_refused_with_the_way_to_make_ours():
    subject = mixer_subject("mamba")
    for foreign in (DynamicCache(config=subject.model.config), ((torch.zeros(1), torch.zeros(1)),)):
        with pytest.raises(ValueError, match=r"past_key_values: .* make one by model\.new_cache\(\)"):
            subject.forward(IDS, foreign)
        with pytest.raises(ValueError, match=r"past_key_values: .* make one by model\.new_cache\(\)"):
            subject.model.generate(IDS, past_key_values=foreign, max_new_tokens=2)


def test_a_cache_of_another_number_of_rows_is_refused():
    subject = mixer_subject("mamba")
    cache = subject.new_cache()
    subject.forward(IDS, cache)
    before = facts(cache)
    with pytest.raises(ValueError, match="past_key_values: holds 2 rows, got a batch of 1"):
        subject.forward(IDS[:1], cache)
    unchanged(before, facts(cache))
    sized = subject.new_cache(batch_size=4)
    with pytest.raises(ValueError, match="past_key_values: holds 4 rows, got a batch of 2"):
        subject.forward(IDS, sized)


def test_a_static_cache_that_is_too_short_is_refused_before_anything_changes():
    subject = hybrid_subject()
    cache = subject.new_cache(static=True, max_length=7)
    subject.forward(IDS[:, :5], cache)
    before = facts(cache)
    with pytest.raises(ValueError, match="max_length=7"):
        subject.forward(IDS[:, :3], cache)
    unchanged(before, facts(cache))
    with pytest.raises(ValueError, match="max_length: a static cache needs it"):
        subject.new_cache(static=True)
    with pytest.raises(ValueError):
        subject.new_cache(static=True, max_length=0)


def test_generate_refuses_what_it_cannot_keep():
    model = mixer_subject("mamba").model
    with pytest.raises(ValueError, match="cache_implementation: 'quantized' is not available"):
        model.generate(IDS, cache_implementation="quantized", max_new_tokens=2)
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match="left padding"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=2)


def test_embeddings_that_are_no_numbers_are_not_hidden():
    subject = mixer_subject("mamba")
    embeds = torch.zeros(1, 4, 16, dtype=torch.float64)
    embeds[0, 2] = math.nan
    logits = subject.forward(None, inputs_embeds=embeds)
    assert bool(torch.isfinite(logits[:, :2]).all())
    assert bool(logits[:, 2:].isnan().any())
