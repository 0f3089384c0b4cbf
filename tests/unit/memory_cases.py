"""A memory without projections, random tokens for it, and the papers' rules as loops that share no code with it.

Shapes: B rows, T tokens, H heads, K key and value width, C chunk size, c window.
"""

import torch
from torch import nn
from torch.func import grad

from hybridlm.modeling.masks import plain_sequence
from hybridlm.modeling.memory import MemoryNetwork
from hybridlm.modeling.neural_memory import MemoryScan

BATCH, TOKENS, HEADS, WIDTH = 2, 13, 2, 4
EXACT = {"rtol": 1e-9, "atol": 1e-10}
UNBOUNDED = {"max_gradient": None, "max_curvature": None}
RULE = (0, 1, 2)  # columns of theta, log eta and log(1 - alpha) behind keys and values
FORMS = {
    "linear": {"depth": 1},
    "linear_to_zero": {"depth": 1, "forget_to": "zero"},
    "linear_without_momentum": {"depth": 1, "momentum": False},
    "mlp": {"depth": 2},
    "mlp_to_zero": {"depth": 2, "forget_to": "zero", "activation": "silu"},
    "deep_with_biases": {"depth": 4, "bias": True, "activation": "relu"},
    "residual": {"depth": 2, "residual_norm": True, "bias": True, "momentum": False},
    "linear_residual": {"depth": 1, "residual_norm": True},
    "huber": {"depth": 2, "objective": "huber", "objective_threshold": 0.3},
    "lp": {"depth": 3, "objective": "lp", "objective_p": 3.0},
    "kl": {"depth": 2, "objective": "kl", "objective_threshold": 0.5},
    "dot": {"depth": 2, "objective": "dot"},
}


def network(dtype=torch.float64, heads=HEADS, width=WIDTH, **options):
    """A network with random weights, learned norm included; without bounds where they are not asked for."""
    made = MemoryNetwork(heads, width, **(UNBOUNDED | options))
    with torch.no_grad():
        for weight in made.initial:
            weight.normal_(std=0.5)
        if made.norm_weight is not None:
            made.norm_weight.normal_(1.0, 0.3)
            made.norm_bias.normal_(std=0.3)
    return made.to(dtype)


def unit(vectors):
    return nn.functional.normalize(vectors, dim=-1)


def gates(*shape, window=1, rate=0.3, momentum=True, forgetting=True, dtype=torch.float64):
    """Random gates `[*shape, 3 or 4]`: theta up to `rate`, log eta, log(1 - alpha), and gamma."""
    theta, eta, alpha, gamma = torch.rand(4, *shape, dtype=dtype)
    eta = 0.9 * eta if momentum else torch.ones_like(eta)
    alpha = 0.3 * alpha if forgetting else torch.zeros_like(alpha)
    columns = [rate * theta, eta.log(), (1 - alpha).log(), gamma]
    return torch.stack(columns[: 3 + (window > 1)], dim=-1)


def draw(net, window=1, tokens=TOKENS, batch=BATCH, rate=0.3, forgetting=True):
    """Queries `[B, T, H, K]`, keys, values and gates as the memory takes them `[B, T, H, F]`."""
    shape, dtype = (batch, tokens, net.num_heads), net.initial[0].dtype
    queries, keys, values = unit(torch.randn(3, *shape, net.head_dim, dtype=dtype))
    rule = gates(*shape, window=window, rate=rate, momentum=net.momentum, forgetting=forgetting, dtype=dtype)
    return queries, torch.cat([keys, values, rule], dim=-1)


def parts(net, tokens):
    """Keys, values, theta, eta, 1 - alpha, and gamma or `None`."""
    width = net.head_dim
    theta, log_eta, log_keep, *gamma = tokens[..., 2 * width :].unbind(-1)
    eta = log_eta.exp() * net.momentum
    gamma = gamma[0] if gamma else None
    return tokens[..., :width], tokens[..., width : 2 * width], theta, eta, log_keep.exp(), gamma


def run(net, queries, tokens, chunk_size, window=1, detach=False):
    """Outputs `[B, T, H, K]` and the state's tensors of one call."""
    scan = MemoryScan(net, chunk_size, window, detach)
    output, _, state = scan(queries, tokens, None, plain_sequence(queries))
    return output, state


def accumulated(net, state, b, h):
    """The accumulated weights of a row's head after the last full chunk, as the loop keeps them."""
    return [w[h] + d[b, h] for w, d in zip(net.initial, net.split(state["memory"]), strict=True)]


def predict(net, head, weights, key):
    """What the network of a head says of one key `[K]`, with the weights `[in, out]` of each layer."""
    activation = {"_gelu": nn.functional.gelu, "_silu": nn.functional.silu, "_relu": torch.relu}
    hidden = key
    for layer, weight in enumerate(weights):
        if net.bias:
            weight, offset = weight[:-1], weight[-1]
            hidden = hidden @ weight + offset
        else:
            hidden = hidden @ weight
        if layer + 1 < len(weights):
            hidden = activation[net.activation.__name__](hidden)
    if net.norm_weight is None:
        return hidden
    size = (len(hidden),)
    return key + nn.functional.layer_norm(hidden, size, net.norm_weight[head], net.norm_bias[head], eps=1e-6)


def loss(net, prediction, value):
    """The named objective by PyTorch's own losses."""
    functional, threshold = nn.functional, net.objective_threshold
    if net.objective == "l2":
        return functional.mse_loss(prediction, value, reduction="sum")
    if net.objective == "lp":
        return ((prediction - value) ** 2 + (0 if net.objective_p == 2 else 1e-6)).sqrt().pow(net.objective_p).sum()
    if net.objective == "huber":
        return 2 * functional.huber_loss(prediction, value, reduction="sum", delta=threshold)
    if net.objective == "kl":
        given, target = (prediction / threshold).log_softmax(-1), (value / threshold).log_softmax(-1)
        return functional.kl_div(given, target, reduction="sum", log_target=True)
    return -2 * prediction @ value


def gradient(net, head, weights, key, value):
    """The gradient of the objective by the weights of each layer."""
    return grad(lambda w: loss(net, predict(net, head, w, key), value))(weights)


def papers_loop(net, queries, tokens, chunk_size, window=1):
    """Titans' and the Omega rule's recurrence, token by token, without bounds; outputs and last weights.

    S_t = eta_t S_{t-1} - theta_t sum_i gamma_i grad_i, M_t = (1 - alpha_t) M_{t-1} + S_t, y_t = M_t(q_t), where the
    gradients are those at the memory with which t's chunk began, and forgetting leads to 0 or to the first memory.
    """
    keys, values, theta, eta, keep, gamma = parts(net, tokens)
    outputs, last = torch.empty_like(queries), {}
    for b in range(queries.shape[0]):
        for h in range(queries.shape[2]):
            first = [weight[h] for weight in net.initial]
            goal = first if net.forget_to == "initial" else [torch.zeros_like(w) for w in first]
            memory, speed = first, [torch.zeros_like(w) for w in first]
            for t in range(queries.shape[1]):
                if t % chunk_size == 0:
                    base = memory
                step = [torch.zeros_like(w) for w in first]
                for i in range(max(0, t + 1 - window), t + 1):
                    weight = 1.0 if gamma is None else gamma[b, i, h]
                    found = gradient(net, h, base, keys[b, i, h], values[b, i, h])
                    step = [s + weight * g for s, g in zip(step, found, strict=True)]
                speed = [eta[b, t, h] * s - theta[b, t, h] * g for s, g in zip(speed, step, strict=True)]
                share = keep[b, t, h]
                kept = [share * w + (1 - share) * g for w, g in zip(memory, goal, strict=True)]
                memory = [w + s for w, s in zip(kept, speed, strict=True)]
                outputs[b, t, h] = predict(net, h, memory, queries[b, t, h])
            last[b, h] = memory
    return outputs, last
