"""The planner's figures equal what is built, what is kept, and what is computed."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlm import presets
from hybridlm.analysis import plan
from hybridlm.analysis.flops import OperationCounter, mixing_flops, product_flops, stream_flops
from hybridlm.modeling import mixer_mamba, mixer_mamba2
from hybridlm.modeling.cache_entries import fields_of
from hybridlm.modeling.channel_moe import Experts, MoE
from hybridlm.modeling.configuration_hybridlm import HybridLMConfig
from hybridlm.modeling.mixer_attention import AttentionMixer
from hybridlm.modeling.mixer_mamba import MambaMixer
from hybridlm.modeling.mixer_mamba2 import Mamba2Mixer
from hybridlm.modeling.modeling_hybridlm import HybridLMForCausalLM
from hybridlm.modeling.registry import CHANNEL_MIXERS, MIXERS, RESIDUALS

TINY = [name for name in presets.preset_names() if name.startswith("tiny_") and not presets.load_config(name).spans]
MIXER_OPTIONS = {
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "mamba2": {"head_dim": 8, "state_size": 16, "num_groups": 2},
    "neural_memory": {"chunk_size": 4},
    "titans_mac": {"segment_size": 4},
    "titans_mag": {"memory": {"name": "neural_memory", "chunk_size": 4}},
    "titans_mal": {"memory": {"name": "neural_memory", "chunk_size": 4}},
}


@pytest.fixture(scope="module", params=[*TINY, *(f"{name}, convolved" for name in ("tiny_llama", "tiny_samba"))])
def built(request):
    """A preset's config, as it is or with convolutions in its attention, and its model."""
    torch.manual_seed(0)
    name, *convolved = request.param.split(", ")
    config = presets.load_config(name)
    for recipe in config.layer_specs.values():
        if convolved and recipe["mixer"]["name"] == "attention":
            recipe["mixer"]["conv_kernel"] = 3
    return config, HybridLMForCausalLM(config).eval()


def test_parameters_equal_what_is_built_layer_by_layer(built):
    config, model = built
    planned = plan(config, context=8)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert [layer.num_parameters for layer in planned.layers] == counts
    assert planned.total.num_parameters == sum(p.numel() for p in model.parameters())


def test_active_parameters_are_those_that_a_token_touches(built):
    """The gradient of one token's output is non-zero in no more parameters than planned: the other experts' are 0."""
    config, model = built
    touched = 0
    for layer in model.model.layers:
        layer.zero_grad()
        hidden_states = torch.randn(1, 1, config.hidden_size)
        for part in (layer.mixer, layer.channel_mixer):
            if part is not None:
                hidden_states = hidden_states + part(hidden_states)[0]
        hidden_states.square().sum().backward()
        for module in layer.modules():
            if isinstance(module, MoE):
                used = [e for e, grad in enumerate(module.experts.down_proj.grad) if bool(grad.any())]
                touched += len(used) * sum(p[0].numel() for p in module.experts.parameters())
    planned = plan(config, context=8)
    idle = planned.total.num_parameters - planned.total.num_active_parameters
    experts = sum(p.numel() for m in model.modules() if isinstance(m, MoE) for p in m.experts.parameters())
    assert experts - idle == touched


@pytest.mark.parametrize("num_tokens", [3, 21])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_state_bytes_equal_the_cache(built, num_tokens, dtype):
    config, _ = built
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = HybridLMForCausalLM(config).eval().to(kind)
    with torch.no_grad():
        cache = model(torch.randint(0, 256, (2, num_tokens)), use_cache=True).past_key_values
    planned = plan(config, context=num_tokens, dtype=dtype)
    assert cache.nbytes == 2 * planned.total.state_bytes
    by_layer = [sum(t.nbytes for t in layer.named_tensors().values()) for layer in cache.layers]
    assert by_layer == [2 * layer.state_bytes for layer in planned.layers]


@pytest.mark.parametrize("calls", [[5] + [1] * 40, [64] + [3] * 9, [1] * 33])
def test_the_cost_of_rollback_is_bounded_by_the_plan(built, calls):
    config, model = built
    window = 8
    cache = model.new_cache(record_window=window)
    cache.activate_past_recording()
    largest = 0
    with torch.no_grad():
        for length in calls:
            model(torch.randint(0, 256, (1, length)), past_key_values=cache, use_cache=True)
            largest = max(largest, recorded_bytes(cache))
    planned = plan(config, context=sum(calls), dtype="fp32", rollback_window=window)
    assert largest <= planned.rollback_bytes
    assert (largest > 0) == (planned.rollback_bytes > 0)


def recorded_bytes(cache):
    """Bytes that checkpoints and inputs hold in memory beside the state itself; what is shared counts once."""
    storages = {}
    for layer in cache.layers:
        for entry in layer.entries:
            kept = [inputs for inputs, _ in getattr(entry, "inputs", [])]
            for state in (getattr(entry, "base", None), getattr(entry, "mark", None)):
                if state is not None and state is not entry.state:
                    kept += fields_of(state).values()
            storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept})
    return sum(storages.values())


def test_products_and_convolutions_equal_the_flop_counter(built):
    config, model = built
    num_tokens, batch = 11, 2
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, Experts):
            module.implementation = "loop"  # the counter sees no grouped product
    counter = FlopCounterMode(display=False, depth=None)
    with torch.no_grad(), counter:
        model(torch.randint(0, 256, (batch, num_tokens)), use_cache=False)
    measured = 0
    counts = counter.get_flop_counts()
    for name, module in model.named_modules():
        leaf = isinstance(module, torch.nn.Linear | torch.nn.Conv1d) or name.endswith((".router", ".experts"))
        if leaf:
            measured += sum(counts.get(f"HybridLMForCausalLM.{name}", {}).values())
    parts = [part for layer in model.model.layers for part in (layer.mixer, layer.channel_mixer) if part is not None]
    planned = sum(product_flops(part) for part in parts) + 2 * model.lm_head.weight.numel()
    expected = sum(product_flops(part, expected=True) for part in parts) + 2 * model.lm_head.weight.numel()
    assert measured <= batch * num_tokens * planned
    assert measured == batch * num_tokens * planned or expected < planned  # choices of no expert cost nothing
    planned += sum(stream_flops(part) for name, part in model.named_modules() if "residual" in name)
    mixing = sum(
        mixing_flops(part["name"], module, t)
        for recipe, layer in zip(config.layer_layout, model.model.layers, strict=True)
        for half in ("mixer", "channel_mixer")
        if (module := getattr(layer, half)) is not None and (part := config.layer_specs[recipe][half])
        for t in range(num_tokens)
    )
    assert plan(config, context=num_tokens).total.prefill_flops == num_tokens * planned + mixing


def test_choices_without_weights_cost_nothing_and_are_expected_at_balance():
    options = {"num_experts": 4, "num_zero_experts": 3, "num_copy_experts": 1, "intermediate_size": 8}
    part, tokens = MoE(16, top_k=2, implementation="loop", **options), 4000
    hidden_states = torch.randn(1, tokens, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        part(hidden_states)
        _, _, indices = part.router(hidden_states)
    router, expert = 2 * part.router.weight.numel(), 2 * sum(p[0].numel() for p in part.experts.parameters())
    assert counter.get_total_flops() == 2 * tokens * router + int((indices < 4).sum()) * expert
    assert product_flops(part) == router + 2 * expert
    assert product_flops(part, expected=True) == router + expert
    # a fresh router prefers no choice much
    assert counter.get_total_flops() / tokens - router == pytest.approx(product_flops(part, expected=True), rel=0.15)


@pytest.mark.parametrize(
    ("name", "part", "module", "reference"),
    [
        ("mamba", MambaMixer(32, state_size=8), mixer_mamba, "selective_scan_reference"),
        ("mamba2", Mamba2Mixer(32, **MIXER_OPTIONS["mamba2"]), mixer_mamba2, "ssd_scan_reference"),
    ],
)
def test_scans_equal_a_count_of_their_reference(name, part, module, reference, monkeypatch):
    counter, scan = OperationCounter(), getattr(module, reference)

    def counted(*args, **kwargs):
        with counter:
            return scan(*args, **kwargs)

    monkeypatch.setattr(module, reference, counted)
    part.forward_reference(torch.randn(1, 7, 32))
    assert counter.products + counter.others == 7 * mixing_flops(name, part, 0)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 4, "num_sinks": 2}])
def test_attention_equals_a_count_of_its_reference(options):
    mixer = AttentionMixer(32, num_heads=4, num_kv_heads=2, **options)

    def count(num_tokens):
        with torch.no_grad(), OperationCounter() as counter:
            mixer.forward_reference(torch.randn(1, num_tokens, 32))
        return counter.products

    # from the second token on: over a single key einsum multiplies elements instead of matrices
    mixing = sum(mixing_flops("attention", mixer, t) for t in range(1, 9))
    assert count(9) - count(1) == 8 * product_flops(mixer) + mixing


@pytest.mark.parametrize("options", [{}, {"num_shared_experts": 1, "shared_gate": True}])
def test_experts_equal_a_count_of_their_reference(options):
    part = MoE(32, num_experts=4, top_k=2, intermediate_size=16, **options)
    with torch.no_grad(), OperationCounter() as counter:
        part.forward_reference(torch.randn(1, 5, 32))
    assert counter.products == 5 * product_flops(part)


@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_streams_equal_a_count_of_what_is_run(name, num_streams):
    options = {} if name == "add" else {"num_streams": num_streams}
    part = RESIDUALS[name](32, **options)
    head = RESIDUALS[name].head(32, **{"eps": 1e-6, "scale_init": 0.01, "norm_eps": 1e-6} | options)
    hidden_states = torch.randn(2, 5, 32)
    stream = hidden_states if head is None else head.expand(hidden_states)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, context = part(stream)
        stream = part.write(stream, hidden_states, context)
        if head is not None:
            head.collapse(stream)
    tied = 0 if head is None else num_streams * 32 * 10  # reading, writing, and reading in the head: no products
    planned = stream_flops(part) + stream_flops(head)
    assert counter.get_total_flops() == 10 * planned - 2 * 3 * tied


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_registered_mixer_can_be_counted_without_a_formula(name):
    """A part that a user registers has no formula; its reference is counted, and holds at least the recurrence."""
    with torch.device("meta"):
        part = MIXERS[name](32, **MIXER_OPTIONS.get(name, {}))
    part.hidden_size = 32
    if name != "attention":  # its reference reads values
        assert mixing_flops("mine", part, 0) >= mixing_flops(name, part, 0)


class Brought(torch.nn.Module):
    """The least that a part brings: a moving sum; it has no reference, and does not keep its width."""

    def __init__(self, hidden_size):
        super().__init__()
        self.keep = torch.nn.Parameter(torch.ones(hidden_size))
        self.out_proj = torch.nn.Linear(hidden_size, hidden_size, bias=False)

    def init_weights(self, std):
        """Nothing to set."""

    def forward(self, hidden_states, state=None, sequence=None):
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.out_proj(self.keep * hidden_states + hidden_states), None


def test_a_part_of_the_users_without_reference_width_and_state_is_planned_by_its_forward(monkeypatch):
    monkeypatch.setitem(MIXERS, "brought", Brought)
    specs = {"a": {"mixer": {"name": "brought"}, "channel_mixer": None}}
    config = HybridLMConfig(layer_specs=specs, num_hidden_layers=1, hidden_size=32, vocab_size=48)
    (layer,) = plan(config, context=16, rollback_window=4).layers
    assert (layer.state_bytes, layer.step_flops) == (0, 2 * 32 * 32 + 2 * 32)
    assert layer.prefill_flops == 16 * layer.step_flops


@pytest.mark.parametrize("name", sorted(CHANNEL_MIXERS))
def test_channel_mixers_keep_no_state(name):
    assert CHANNEL_MIXERS[name](32).state_spec(5, torch.float32) == {}


def test_state_of_recurrences_is_constant_and_of_attention_linear():
    config = presets.load_config("tiny_jamba")
    short, long = (plan(config, context=n).layers for n in (16, 32))
    for a, b in zip(short, long, strict=True):
        assert b.state_bytes == (2 if a.mixer == "attention" else 1) * a.state_bytes


def test_a_plan_is_json():
    planned = json.loads(json.dumps(plan(presets.load_config("tiny_jamba"), context=16).to_dict()))
    total = sum(layer["num_parameters"] for layer in planned["layers"]) + planned["outer"]["num_parameters"]
    assert planned["total"]["num_parameters"] == total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype: unknown 'int4', expected one of"),
        ({"context": 0}, "context=0 must be at least 1"),
        ({"rollback_window": -1}, "rollback_window=-1 must be at least 0"),
    ],
)
def test_a_bad_question_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(presets.load_config("tiny_llama"), **options)
