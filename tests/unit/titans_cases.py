"""The Titans mixers written out with plain torch functions, for memories that do not learn.

Shapes: B rows, T tokens, H heads, K their width, D hidden size.
"""

import torch
from torch.nn.functional import conv1d, gelu, pad, rms_norm, silu

from hybridlm import MIXERS
from hybridlm.testing import scale_weights

HIDDEN = 16
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "num_persistent": 2}
MEMORY = {"name": "neural_memory", "num_heads": 2, "head_dim": 4, "conv_kernel": 3, "max_learning_rate": 2.0}
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def build(kind, memory=None, **options):
    options = ATTENTION | {"segment_size" if kind == "mac" else "window": 4} | options
    options |= {"memory": MEMORY | ({} if kind == "mac" else {"chunk_size": 4}) | (memory or {})}
    return scale_weights(MIXERS[f"titans_{kind}"](HIDDEN, **options)).double().eval()


def draw(batch=2, tokens=19, dtype=torch.float64):
    return torch.randn(batch, tokens, HIDDEN, dtype=dtype)


def norm(module, values):
    return rms_norm(values, (values.shape[-1],), module.weight, module.eps)


def convolved(conv, values):
    """`[B, T, C]` through a causal convolution and SiLU."""
    padded = pad(values.transpose(1, 2), (conv.kernel_size[0] - 1, 0))
    return silu(conv1d(padded, conv.weight, conv.bias, groups=conv.groups).transpose(1, 2))


def said(memory, queries, inputs):
    """What a memory that has learned nothing answers to `[B, T, H K]`, gated by `[B, T, D]` and projected."""
    queries = queries.unflatten(-1, (memory.num_heads, memory.head_dim))
    queries = queries / queries.square().sum(-1, keepdim=True).add(1e-6).sqrt()
    first, second = memory.scan.network.initial
    answers = torch.einsum("bthk,hkm->bthm", queries, first)
    answers = torch.einsum("bthm,hmk->bthk", gelu(answers), second)
    return (norm(memory.norm, answers).flatten(2) * silu(inputs @ memory.gate_proj.weight.T)) @ memory.out_proj.weight.T


def untaught(memory, inputs):
    """The whole branch of a memory that has learned nothing, `[B, T, D]`."""
    width = memory.num_heads * memory.head_dim
    return said(memory, convolved(memory.conv1d, inputs @ memory.qkv_proj.weight.T)[..., :width], inputs)


def attended(branch, inputs, columns, visible):
    """Attention without positions of `[B, T, D]` to `columns` `[B, S, D]` where `visible` `[T, S]`, and to P."""
    heads, groups, width = branch.num_heads, branch.num_kv_heads, branch.head_dim
    query = (inputs @ branch.q_proj.weight.T).unflatten(-1, (heads, width)).transpose(1, 2)
    key, value = (
        (columns @ weight.T).unflatten(-1, (groups, width)).transpose(1, 2)
        for weight in (branch.k_proj.weight, branch.v_proj.weight)
    )
    if branch.num_persistent:
        key, value = (
            torch.cat([learned[None].expand(len(inputs), -1, -1, -1), own], dim=2)
            for learned, own in ((branch.persistent_keys, key), (branch.persistent_values, value))
        )
        visible = pad(visible, (branch.num_persistent, 0), value=True)
    key, value = key.repeat_interleave(heads // groups, 1), value.repeat_interleave(heads // groups, 1)
    scores = (query @ key.transpose(-1, -2) / width**0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2) @ branch.o_proj.weight.T


def gated(gate, attention, memory):
    return (norm(gate.norm, attention) * torch.sigmoid(norm(gate.memory_norm, memory))) @ gate.proj.weight.T


def window_mask(tokens, window):
    place = torch.arange(tokens)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)


def mac_that_never_learns(mixer, inputs):
    """Memory as context with the initial memory everywhere, token by token over the mask of segments."""
    tokens = inputs.shape[1]
    context = said(mixer.memory, convolved(mixer.query_conv, inputs @ mixer.query_proj.weight.T), inputs)
    segment = torch.arange(tokens) // mixer.segment_size
    visible = window_mask(tokens, tokens) & (segment[:, None] == segment)
    y = attended(mixer.attention, inputs, torch.cat([context, inputs], 1), torch.cat([visible, visible], 1))
    y = y + inputs if mixer.attention_residual else y
    return gated(mixer.gate, y, untaught(mixer.memory, y))
