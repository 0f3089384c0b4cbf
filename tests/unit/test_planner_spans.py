"""Where tokens choose their layers: the planner's bound holds, and is met when every token enters."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hybridlm import HybridLMConfig, presets
from hybridlm.analysis import plan
from hybridlm.analysis.flops import product_flops
from hybridlm.cli import app
from hybridlm.modeling.cache_entries import fields_of
from hybridlm.modeling.modeling_hybridlm import HybridLMForCausalLM

SPECS = {
    "attention": {"mixer": {"name": "attention", "num_heads": 4}, "channel_mixer": {"name": "swiglu"}},
    "mamba": {"mixer": {"name": "mamba", "state_size": 4}, "channel_mixer": {"name": "mlp"}},
    "window": {"mixer": {"name": "attention", "num_heads": 4, "window": 3}, "channel_mixer": None},
}
LAYOUT = ["attention", "mamba", "attention", "window", "mamba"]
CEILING = 0.2


def mod(start, stop, **options):
    return {"name": "mixture_of_depths", "start": start, "stop": stop} | options


def merge(start, stop, **options):
    return {"name": "token_merging", "start": start, "stop": stop} | options


SPANS = {
    "ceiling": [mod(1, 4, ceiling=CEILING)],
    "random": [mod(0, 3, rule="random", capacity=0.5)],
    "predictor": [mod(2, 3, rule="predictor", capacity=0.5, predictor_size=6)],
    "nested": [mod(0, 5, capacity=0.6, ceiling=0.7), mod(1, 4, capacity=0.5, ceiling=0.5), mod(2, 3, rule="random")],
    "stride": [merge(1, 4, boundary="stride", stride=3)],
    "stride-first": [merge(1, 4, boundary="stride", stride=3, representative="first")],
    "cosine": [merge(1, 4, threshold=0.1, ceiling=0.6)],
    "cosine-mean": [merge(1, 4, threshold=0.1, representative="mean")],
    "learned": [merge(1, 4, boundary="learned", threshold=0.1)],
    "merging-in-depths": [mod(0, 5, rule="random", capacity=0.6), merge(1, 4, boundary="learned", threshold=0.1)],
}
NO_LIMIT = {
    "nested": [mod(0, 5), mod(1, 4), mod(2, 3)],
    "one": [mod(1, 3)],
    "cosine": [merge(1, 4, threshold=2.0)],
    "learned": [merge(1, 4, boundary="learned", threshold=2.0)],
    "stride": [merge(1, 4, boundary="stride", stride=1)],
}
SPANNED = [name for name in presets.preset_names() if name.startswith("tiny_") and presets.load_config(name).spans]


def config_of(spans, residual="add"):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": len(LAYOUT)}
    return HybridLMConfig(layer_specs=SPECS, layer_layout=LAYOUT, spans=spans, residual={"name": residual}, **sizes)


def build(spans, residual="add"):
    torch.manual_seed(0)
    return HybridLMForCausalLM(config_of(spans, residual)).eval()


def let_in(model, everyone=True):
    """Force the decision of every span."""
    for span in model.model.spans:
        if span.threshold_bias is not None:
            span.threshold_bias.fill_(float("inf") if everyone else float("-inf"))


def tokens(batch, length):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def measured_products(model, input_ids):
    """FLOPs of linear layers and convolutions, what spans decide from left out."""
    model.set_attn_implementation("eager")
    kinds = (torch.nn.Linear, torch.nn.Conv1d)
    leaves = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    counter = FlopCounterMode(display=False, depth=None)
    with torch.no_grad(), counter:
        model(input_ids, use_cache=False)
    counts = counter.get_flop_counts()
    return sum(sum(counts.get(f"HybridLMForCausalLM.{name}", {}).values()) for name in leaves)


@pytest.mark.parametrize("name", SPANS)
def test_parameters_of_a_span_equal_what_is_built(name):
    model, planned = build(SPANS[name]), plan(config_of(SPANS[name]), context=8)
    counts = [sum(p.numel() for p in span.parameters()) for span in model.model.spans]
    assert [span.num_parameters for span in planned.spans] == counts
    assert planned.total.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SPANNED)
def test_a_preset_with_spans_lies_under_its_plan(name):
    torch.manual_seed(0)
    config, input_ids = presets.load_config(name), tokens(2, 50)
    model = HybridLMForCausalLM(config).eval()
    planned = plan(config, context=50, dtype="fp32")
    with torch.no_grad():
        cache = model(input_ids, use_cache=True).past_key_values
    assert planned.total.num_parameters == sum(p.numel() for p in model.parameters())
    assert cache.nbytes <= 2 * planned.total.state_bytes
    assert measured_products(model, input_ids[:1]) < planned.total.prefill_flops


@pytest.mark.parametrize(("name", "residual"), [*((name, "add") for name in NO_LIMIT), ("cosine", "hyper_connections")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_state_bytes_equal_the_cache_when_every_token_enters(name, residual, dtype):
    model = build(NO_LIMIT[name], residual).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    let_in(model)
    with torch.no_grad():
        cache = model(tokens(2, 21), use_cache=True).past_key_values
    planned = plan(config_of(NO_LIMIT[name], residual), context=21, dtype=dtype)
    assert cache.nbytes == 2 * planned.total.state_bytes
    kept = [sum(t.nbytes for t in span.named_tensors().values()) for span in cache.spans]
    assert kept == [2 * span.state_bytes for span in planned.spans]


@pytest.mark.parametrize("residual", ["add", "hyper_connections"])
@pytest.mark.parametrize("calls", [[5] + [1] * 40, [64] + [3] * 9])
@pytest.mark.parametrize("name", SPANS)
def test_the_cost_of_rollback_is_bounded_by_the_plan(name, calls, residual):
    model, window = build(SPANS[name], residual), 8
    cache, largest = model.new_cache(record_window=window), 0
    cache.activate_past_recording()
    for length in calls:
        with torch.no_grad():
            model(tokens(1, length), past_key_values=cache, use_cache=True)
        largest = max(largest, recorded_bytes(cache))
    planned = plan(config_of(SPANS[name], residual), context=sum(calls), dtype="fp32", rollback_window=window)
    assert 0 < largest <= planned.rollback_bytes


def recorded_bytes(cache):
    """Bytes of checkpoints and inputs that are kept beside the state itself."""
    total = 0
    for entry in (entry for stream in cache.streams for entry in stream.entries):
        total += sum(inputs.nbytes for inputs, _ in getattr(entry, "inputs", []))
        states = {id(state): state for state in (getattr(entry, "base", None), getattr(entry, "mark", None)) if state}
        states.pop(id(getattr(entry, "state", None)), None)
        total += sum(tensor.nbytes for state in states.values() for tensor in fields_of(state).values())
    return total


@pytest.mark.parametrize("calls", [[40], [1] * 40, [7, 1, 1, 20, 1, 10]])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SPANS)
def test_state_bytes_of_any_text_lie_under_the_bound(name, batch, calls):
    model, input_ids = build(SPANS[name]), tokens(batch, sum(calls))
    cache, start = model.new_cache(), 0
    planned = plan(config_of(SPANS[name]), context=sum(calls), dtype="fp32")
    for length in calls:
        with torch.no_grad():
            model(input_ids[:, start : start + length], past_key_values=cache, use_cache=True)
        start += length
    assert 0 < cache.nbytes <= batch * planned.total.state_bytes


@pytest.mark.parametrize("wanted", [True, None])
def test_a_ceiling_bounds_the_keys_as_the_static_cache_does(wanted):
    model, length = build(SPANS["ceiling"]), 60
    if wanted:
        let_in(model)
    for static in (False, True):
        cache = model.new_cache(static=static, max_length=length if static else None)
        with torch.no_grad():
            model(tokens(2, length), past_key_values=cache, use_cache=True)
        keys = cache.layers[2].keys.shape[2] - static  # a static buffer has one slot to spare
        planned = plan(config_of(SPANS["ceiling"]), context=length).layers[2].max_tokens
        assert planned == 12
        assert keys == 12 if wanted or static else keys <= 12
        assert keys <= CEILING * length + 1


def test_products_equal_the_flop_counter_when_every_token_enters():
    model, planned = build(NO_LIMIT["nested"]), plan(config_of(NO_LIMIT["nested"]), context=13)
    let_in(model)
    measured = measured_products(model, tokens(2, 13))
    mixing = plan(config_of([]), context=13).total.prefill_flops - measured_products(build([]), tokens(1, 13))
    routers = 13 * sum(product_flops(span) for span in model.model.spans)
    assert measured // 2 + routers + mixing == planned.total.prefill_flops


@pytest.mark.parametrize("name", SPANS)
def test_products_equal_the_flop_counter_for_the_tokens_that_enter(name):
    """One row, so that no place is padded; the count of each layer's tokens comes from the output."""
    model, input_ids = build(SPANS[name]), tokens(1, 40)
    with torch.no_grad():
        output = model.model(input_ids, output_router_logits=True, use_cache=False)
    expected = 40 * 2 * model.lm_head.weight.numel()
    for depth, layer in enumerate(model.model.layers):
        mask = output.layer_masks.get(depth)
        entered = 40 if mask is None else int(mask.sum())
        expected += entered * sum(
            product_flops(part) for part in (layer.mixer, layer.channel_mixer) if part is not None
        )
    assert measured_products(model, input_ids) == expected
    assert expected < plan(config_of(SPANS[name]), context=40).total.prefill_flops


@pytest.mark.parametrize("name", ["one", "predictor", "cosine", "learned", "stride"])
@pytest.mark.parametrize("num_tokens", [9, 70])
def test_products_of_a_choice_equal_the_flop_counter(name, num_tokens):
    spans = (SPANS | NO_LIMIT)[name]
    model, planned = build(spans), plan(config_of(spans), context=num_tokens)
    let_in(model)
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        model(tokens(2, num_tokens), use_cache=False)
    counts = counter.get_flop_counts()

    def measured(place):
        return sum(counts.get(f"HybridLMForCausalLM.model.{place}", {}).values())

    span = model.model.spans[0]
    layers = sum(measured(f"layers.{depth}") for depth in range(span.start, span.stop))
    assert measured("spans.0") - layers == 2 * planned.spans[0].prefill_flops


def test_a_span_that_no_token_enters_costs_its_choice():
    model = build([mod(1, 4)])
    let_in(model, False)
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        model(tokens(2, 9), use_cache=False)
    counts = counter.get_flop_counts()
    assert sum(counts["HybridLMForCausalLM.model.spans.0"].values()) == 18 * product_flops(model.model.spans[0])


def test_what_is_expected_is_the_target_and_nothing_else_changes():
    plain, planned = (plan(config_of(spans), context=400) for spans in ([], SPANS["nested"]))
    shares = [1.0, 0.6, 0.3, 0.3 * 0.125]
    depth_of = [1, 2, 3, 2, 1]
    assert [layer.expected_tokens for layer in planned.layers] == [round(400 * shares[d]) for d in depth_of]
    assert [layer.max_tokens for layer in planned.layers] == [280, 140, 140, 140, 280]
    for before, layer in zip(plain.layers, planned.layers, strict=True):
        assert layer.expected_prefill_flops < layer.prefill_flops <= before.prefill_flops
        assert layer.expected_state_bytes <= layer.state_bytes <= before.state_bytes
        assert layer.expected_step_flops < layer.step_flops <= before.step_flops
    assert plain.total.expected_step_flops == plain.total.step_flops
    assert plain.total.expected_state_bytes == plain.total.state_bytes


@pytest.mark.parametrize("rule", ["random", "threshold"])
def test_measured_shares_come_near_what_is_expected(rule):
    spans = [mod(1, 4, rule=rule, capacity=0.5)]
    model, planned = build(spans), plan(config_of(spans), context=400, dtype="fp32").total
    with torch.no_grad():
        cache = model(tokens(1, 400), use_cache=True).past_key_values
    assert cache.nbytes == pytest.approx(planned.expected_state_bytes, rel=0.2)
    assert cache.nbytes < planned.state_bytes


def test_describe_has_a_row_a_span(tmp_path):
    config = config_of(SPANS["nested"]).to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    output = CliRunner().invoke(app, ["describe", str(path), "--context", "64"]).stdout
    planned = plan(config_of(SPANS["nested"]), context=64)
    rows = [line for line in output.splitlines() if "mixture_of_depths" in line and "│" in line]
    reaches = [line for line in output.splitlines() if line.startswith("mixture_of_depths")]
    for row, reach, span in zip(rows, reaches, planned.spans, strict=True):
        assert f"{span.expected_step_flops:,} │" in row
        bound = f"at most {span.max_tokens}" if span.max_tokens < 64 else "no bound"
        assert f"of 64 tokens {span.expected_tokens} expected, {bound}" in reach
    total = planned.total
    bound, expected = (
        next(line for line in output.splitlines() if label in line)
        for label in ("total, at most", "expected at the target")
    )
    assert f"{total.state_bytes:,}" in bound
    assert f"{total.step_flops:,}" in bound
    for figure in (total.expected_active_parameters, total.expected_state_bytes, total.expected_step_flops):
        assert f"{figure:,}" in expected
    assert f"prefill of 64 tokens: {total.prefill_flops:,} FLOPs at most" in output
    assert f"{total.expected_prefill_flops:,} expected at the target" in output
    answer = json.loads(CliRunner().invoke(app, ["describe", str(path), "--context", "64", "--json"]).stdout)
    assert [span["expected_share"] for span in answer["spans"]] == [0.6, 0.5, 0.125]


@pytest.mark.parametrize("name", ["random", "nested"])
def test_expected_active_parameters_are_the_layers_weighed_by_who_comes(name):
    planned = plan(config_of(SPANS[name]), context=50)
    shares = {"random": [0.5, 0.5, 0.5, 1, 1], "nested": [0.6, 0.3, 0.3 * 0.125, 0.3, 0.6]}[name]
    came = {"random": [1], "nested": [1, 0.6, 0.3]}[name]
    expected = planned.outer.num_parameters
    expected += sum(share * layer.num_parameters for share, layer in zip(shares, planned.layers, strict=True))
    expected += sum(share * span.num_parameters for share, span in zip(came, planned.spans, strict=True))
    assert planned.total.expected_active_parameters == pytest.approx(expected, abs=len(planned.layers))
    dense = plan(config_of([]), context=50).total
    assert dense.expected_active_parameters == dense.num_active_parameters == dense.num_parameters
