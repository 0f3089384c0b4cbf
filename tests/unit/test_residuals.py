"""What the papers promise of residual streams; the contract tests hold the promises of whole models."""

import pytest
import torch
from variants import ATTENTION, MAMBA, STREAMS, small

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.registry import RESIDUALS
from hybridlm.modeling.residual_hyper_connections import HyperConnectionsResidual
from hybridlm.modeling.residual_manifold_hyper_connections import ManifoldHyperConnectionsResidual, sinkhorn
from hybridlm.testing import relative_error, scale_weights
from hybridlm.training.parameter_groups import decayed_parameter_names

HIDDEN = 16
IDS = torch.arange(22).view(2, 11)
LAYERS = [(MAMBA, small("mlp")), (ATTENTION, None), (None, small("swiglu"))]


def build(residual, placement="pre", layers=LAYERS, **fields):
    recipes = {f"r{i}": {"mixer": mixer, "channel_mixer": channel} for i, (mixer, channel) in enumerate(layers)}
    config = HybridLMConfig(
        vocab_size=31,
        hidden_size=HIDDEN,
        num_hidden_layers=len(layers),
        layer_specs=recipes,
        layer_layout=list(recipes),
        residual=residual,
        norm={"name": "rms", "placement": placement},
        initializer_range=0.3,
        **fields,
    )
    torch.manual_seed(0)
    return HybridLMForCausalLM(config)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def streams(n, dtype=torch.float64, equal=False):
    """A stream `[2, 5, n, HIDDEN]` and the output of a sub-layer."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 5, 1 if equal else n, HIDDEN, generator=generator, dtype=torch.float64)
    update = torch.randn(2, 5, HIDDEN, generator=generator, dtype=torch.float64)
    return stream.expand(-1, -1, n, -1).to(dtype), update.to(dtype)


NEUTRAL = {
    "static": ({"name": "hyper_connections", "dynamic": False}, 1e-12),
    "dynamic": ({"name": "hyper_connections"}, 1e-12),
    "two": ({"name": "hyper_connections", "num_streams": 2}, 1e-12),
    "manifold": ({"name": "manifold_hyper_connections", "eps": 0.0}, 1e-7),  # first values are drawn in float32
    "manifold with eps": ({"name": "manifold_hyper_connections"}, 1e-5),
    "manifold of one": ({"name": "manifold_hyper_connections", "num_streams": 1}, 1e-5),
}


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
@pytest.mark.parametrize("case", NEUTRAL)
def test_a_new_model_is_the_plain_residual_model(case, placement):
    residual, tolerance = NEUTRAL[case]
    shared = {"multiplier": 0.7, "layer_scale": 0.5}
    plain = build({"name": "add"} | shared, placement).double().eval()
    model = build(residual | shared, placement).double().eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert relative_error(logits(model), logits(plain)) <= tolerance


@pytest.mark.parametrize("seed", range(3))
def test_equal_streams_stay_the_plain_residual_for_any_doubly_stochastic_mixing(seed):
    torch.manual_seed(seed)
    part = ManifoldHyperConnectionsResidual(HIDDEN, eps=0.0, scale_init=1.0).double()
    with torch.no_grad():
        part.mix_weight[8:].normal_()
        part.mix_base[8:].normal_()
    stream, update = streams(4, equal=True)
    inner, context = part(stream)
    assert (context.mix - context.mix.transpose(-1, -2)).abs().max() > 0.1
    written = part.write(stream, update, context)
    assert relative_error(inner, stream[:, :, 0]) <= 1e-6
    assert relative_error(written, stream + update[:, :, None]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_rows_and_columns_of_the_mixing_sum_to_one(n, dtype):
    torch.manual_seed(0)
    logits, ones = torch.randn(200, n, n, dtype=dtype), torch.ones(200, n, dtype=dtype)
    for iterations, rows in ((20, 5e-3), (1000, 1e-5)):  # columns come last and are exact at once
        matrix = sinkhorn(logits, iterations, eps=1e-6)
        assert (matrix > 0).all()
        torch.testing.assert_close(matrix.sum(-2), ones, rtol=0, atol=5e-6)
        torch.testing.assert_close(matrix.sum(-1), ones, rtol=0, atol=rows)
    if n == 1:
        torch.testing.assert_close(matrix, torch.ones_like(matrix), rtol=0, atol=3e-6)


def test_streams_do_not_blow_up_through_a_hundred_mixings():
    torch.manual_seed(0)
    product = torch.eye(4)
    for matrix in sinkhorn(2 * torch.randn(100, 4, 4), iterations=20, eps=1e-6):
        product = matrix.T @ product
    assert torch.linalg.matrix_norm(product, 2) <= 1 + 1e-3


def test_the_mean_of_the_streams_goes_through_the_manifold_mixing_unchanged():
    part = scale_weights(ManifoldHyperConnectionsResidual(HIDDEN, eps=0.0, sinkhorn_iterations=200)).double()
    stream, _ = streams(4)
    mixed = part.write(stream, torch.zeros(2, 5, HIDDEN, dtype=torch.float64), part(stream)[1])
    assert relative_error(mixed.mean(2), stream.mean(2)) <= 1e-7


@pytest.mark.parametrize("dynamic", [False, True])
def test_hyper_connections_are_the_matrices_of_the_paper(dynamic):
    part = scale_weights(HyperConnectionsResidual(HIDDEN, num_streams=3, dynamic=dynamic)).double()
    stream, update = streams(3)
    read, mix, write = part.mix_base.view(3, 5).split([1, 3, 1], dim=1)  # A_m [n, 1], A_r [n, n], b [n, 1]
    for b in range(2):
        for t in range(5):
            h, a_m, a_r, beta = stream[b, t], read, mix, write
            if dynamic:
                change = torch.tanh(part.norm(h) @ part.mix_weight.T)  # [n, n + 2]
                a_m = a_m + part.mix_scale[0] * change[:, :1]
                a_r = a_r + part.mix_scale[0] * change[:, 1:4]
                beta = beta + part.mix_scale[1] * change[:, 4:]
            inner, context = part(stream)
            torch.testing.assert_close(inner[b, t], (a_m.T @ h)[0])
            expected = a_r.T @ h + beta * update[b, t]
            torch.testing.assert_close(part.write(stream, update, context)[b, t], expected)


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_added_can_be_scaled_and_dropped(name):
    part = scale_weights(RESIDUALS[name](HIDDEN, multiplier=0.5, layer_scale=0.3, dropout=0.5)).double()
    plain = RESIDUALS[name](HIDDEN).double()
    plain.load_state_dict(part.state_dict(), strict=False)
    stream, update = streams(4)
    context = part.eval()(stream)[1]
    expected = plain.write(stream, 0.5 * part.scale * update, plain(stream)[1])
    torch.testing.assert_close(part.write(stream, update, context), expected)
    kept = part.train().write(stream, torch.ones_like(update), context) - part.write(stream, 0 * update, context)
    share = (kept[:, :, 0] != 0).double().mean()
    assert 0.3 < share < 0.7


def test_a_sub_layer_begins_with_the_stream_of_its_number_and_absent_halves_do_not_count():
    model = build({"name": "hyper_connections", "num_streams": 3})
    parts = [module for module in model.modules() if isinstance(module, HyperConnectionsResidual)]
    assert [int(part.mix_base.view(3, 5)[:, 0].argmax()) for part in parts] == [0, 1, 2, 0]


@pytest.mark.parametrize("name", STREAMS)
def test_gates_are_float32_inside_a_bfloat16_model(name):
    part = scale_weights(RESIDUALS[name](HIDDEN))
    stream, update = streams(4, torch.bfloat16)
    wide = part.gates(stream)
    for cast in (part.bfloat16(), part.half()):
        found = cast.gates(stream)
        assert {tensor.dtype for tensor in found} == {torch.float32}
        assert {getattr(cast, leaf).dtype for leaf in cast.float32_names} == {torch.float32}
    if name.startswith("manifold"):  # the other one has a norm, whose weight is bfloat16 now
        torch.testing.assert_close(found, wide, rtol=0, atol=0)
    inner, context = part.bfloat16()(stream)
    assert {inner.dtype, part.write(stream, update, context).dtype} == {torch.bfloat16}


@pytest.mark.parametrize("name", STREAMS)
def test_autocast_leaves_gates_and_streams_alone(name):
    part = scale_weights(RESIDUALS[name](HIDDEN))
    stream, update = streams(4, torch.float32)
    expected = part.write(stream, update, part(stream)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inner, context = part(stream)
        actual = part.write(stream, update, context)
    assert torch.equal(actual, expected)
    assert inner.dtype == torch.float32


@pytest.mark.parametrize("residual", [{"name": name} for name in STREAMS] + [{"name": "add", "layer_scale": 0.5}])
def test_a_gradient_reaches_every_parameter(residual):
    model = scale_weights(build(residual)).double()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("name", STREAMS)
def test_streams_part_in_training(name):
    """Equal streams get unequal gradients, so that a step of training parts them."""
    model = build({"name": name}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    found = []
    model.model.residual_head.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits(model)
    spread = found[0].std(dim=2).mean() / found[0].std()
    assert spread > 0.01


@pytest.mark.parametrize("name", STREAMS)
def test_recorded_hidden_states_are_means_of_the_streams(name):
    model = scale_weights(build({"name": name})).eval()
    found = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True)
    assert {tuple(x.shape) for x in output.hidden_states} == {(2, 11, HIDDEN)}
    torch.testing.assert_close(output.hidden_states[1], found[0].mean(2))


@pytest.mark.parametrize("name", STREAMS)
def test_weight_decay_leaves_bases_and_scales_alone(name):
    model = build({"name": name})
    mixing = {leaf for leaf in dict(model.named_parameters()) if ".mix_" in leaf}
    decayed = mixing & set(decayed_parameter_names(model))
    assert decayed == {leaf for leaf in mixing if leaf.endswith("mix_weight")}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("where", ["config", "recipe"])
def test_a_norm_after_the_sum_is_refused_with_several_streams(name, where):
    layers = [(small("mlp"), None)]
    fields = {"name": "rms", "placement": "post"}
    recipe = {"mixer": MAMBA, "channel_mixer": None} | ({"norm": fields} if where == "recipe" else {})
    config = HybridLMConfig(
        vocab_size=31,
        hidden_size=HIDDEN,
        num_hidden_layers=len(layers),
        layer_specs={"mine": recipe},
        layer_layout=["mine"],
        residual={"name": name},
        norm=fields if where == "config" else None,
    )
    message = f"residual: {name} needs norm placement 'pre' or 'sandwich', recipe 'mine' has 'post'"
    with pytest.raises(ValueError, match=message):
        HybridLMForCausalLM(config)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        ({"name": "hyper_connections", "num_streams": 0}, "residual.num_streams=0 must be at least 1"),
        ({"name": "hyper_connections", "norm_eps": 0.0}, "residual.norm_eps=0.0 must be above 0"),
        ({"name": "hyper_connections", "dynamic": 1}, "residual.dynamic: expected bool"),
        ({"name": "hyper_connections", "dropout": 1.0}, r"residual.dropout=1.0 must lie in \[0, 1\)"),
        ({"name": "manifold_hyper_connections", "num_streams": -1}, "residual.num_streams=-1 must be at least 1"),
        (
            {"name": "manifold_hyper_connections", "sinkhorn_iterations": 0},
            "residual.sinkhorn_iterations=0 must be at least 1",
        ),
        ({"name": "manifold_hyper_connections", "eps": -1e-6}, "residual.eps=-1e-06 must lie in"),
        ({"name": "manifold_hyper_connections", "eps": 0.2}, "residual.eps=0.2 must lie in"),
        ({"name": "manifold_hyper_connections", "norm_eps": -1.0}, "residual.norm_eps=-1.0 must be above 0"),
        ({"name": "manifold_hyper_connections", "dynamic": True}, "residual: unknown option 'dynamic'"),
    ],
)
def test_a_bad_option_is_refused_when_the_model_is_built(residual, message):
    with pytest.raises(ValueError, match=message):
        build(residual)
