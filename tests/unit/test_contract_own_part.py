"""A part that is registered at run time keeps the promises by what it does with `state` and `sequence` alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from variants import ATTENTION, build

from hybridlm import MIXERS
from hybridlm.modeling.precision import state_dtype
from hybridlm.testing import CHECKS, Subject, state_influence


@dataclass
class DecayState:
    """`[B, H, K, K]`."""

    memory: Tensor


class DecayMixer(nn.Module):
    """Linear attention with one forget gate a head, token by token; the shortest mixer that has a state."""

    state_type = DecayState

    def __init__(self, hidden_size: int, *, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.decay_proj = nn.Linear(hidden_size, num_heads)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def init_weights(self, std: float) -> None:
        """Nothing to set."""

    def state_spec(self, num_tokens, dtype):
        """One matrix a head."""
        return {"memory": ((self.num_heads, self.head_dim, self.head_dim), state_dtype(dtype))}

    def forward(self, hidden_states, state=None, sequence=None):
        """Map `[B, T, D]` to `[B, T, D]`."""
        query, key, value = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        keep = torch.sigmoid(self.decay_proj(hidden_states))
        mask = None if sequence is None else sequence.token_mask
        if mask is not None:
            key, keep = key * mask[..., None, None], keep.masked_fill(~mask[..., None], 1.0)
        memory = key.new_zeros(key.shape[0], self.num_heads, self.head_dim, self.head_dim)
        memory = memory if state is None else state.memory
        outputs = []
        for t in range(hidden_states.shape[1]):
            if sequence is not None and sequence.starts is not None:
                memory = memory.masked_fill(sequence.starts[:, t, None, None, None], 0.0)
            memory = keep[:, t, :, None, None] * memory + key[:, t, :, :, None] * value[:, t, :, None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], memory))
        return self.out_proj(torch.stack(outputs, 1).flatten(2)), DecayState(memory)


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setitem(MIXERS, "decay", DecayMixer)
    decay = {"name": "decay", "num_heads": 4}
    return Subject(build([(decay, None), (ATTENTION, None), (decay, {"name": "mlp"})], hidden_size=16))


@pytest.mark.parametrize(
    "check",
    [
        "chunked_continuation",
        "step_is_scan",
        "left_padding",
        "right_padding",
        "pads_in_stream",
        "packed_by_position_ids",
        "packed_by_seq_idx",
        "packed_gradients",
        "snapshots",
        "static_is_dynamic",
        "rows_move_with_the_cache",
        "rollback",
        "rollback_beyond_the_record",
        "rollback_across_documents",
        "anything_goes",
        "gradient_checkpointing",
        "prompt_lookup",
        "assisted",
    ],
)
def test_a_part_of_ones_own_keeps_the_promises(subject, check):
    assert CHECKS[check](subject) <= 1e-9


def test_its_state_matters(subject):
    assert min(state_influence(subject).values()) >= 0.01
