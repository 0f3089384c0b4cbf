"""What the Titans mixers share: their state, the gate by a memory, and the mixers of a memory and a sliding window.

Shapes: B batch, T tokens, D hidden size, G key-value heads, K head width, W window.
Reference: Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, section 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention_branch import AttentionBranch
from .masks import SequenceInfo, plain_sequence
from .memories import build_memory
from .neural_memory import NeuralMemoryState
from .norms import RMSNorm


@dataclass(kw_only=True)
class TitansState(NeuralMemoryState):
    """The state of the memory, and keys and values `[B, G, W - 1, K]` of the last tokens (see `lookback.py`)."""

    keys: Tensor
    values: Tensor


class GateByMemory(nn.Module):
    """Multiply what attention says by what the memory says of it, `norm(y) * sigmoid(norm(m))`, and project it.

    Args:
        hidden_size: Width D.
        norm_eps: Added to the mean squares.
    """

    def __init__(self, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, eps=norm_eps)
        self.memory_norm = RMSNorm(hidden_size, eps=norm_eps)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, attended: Tensor, remembered: Tensor) -> Tensor:
        """Map two `[B, T, D]` to one."""
        return self.proj(self.norm(attended) * torch.sigmoid(self.memory_norm(remembered)))


class MemoryAndWindow(nn.Module):
    """Mix tokens by attention over the last of them and a memory over all of them.

    A subclass says how the two meet, in `join`.

    Args:
        hidden_size: Width D of the residual stream.
        num_heads: Query heads of the attention.
        num_kv_heads: Key-value heads G; `num_heads` by default.
        head_dim: Width K of a head; D / `num_heads` by default.
        position: Position encoding of the attention, `{"name": "none"}` or `{"name": "rope", ...}`.
        window: Tokens W that a token attends to, itself included.
        num_persistent: Learned keys and values that every token attends to besides.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        norm_eps: Added to mean squares.
        memory: `{"name": "neural_memory", ...}` with the options of that mixer.
    """

    state_type = TitansState
    full_precision = ("memory.qkv_proj", "memory.gates.proj")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        position: dict | None = None,
        window: int = 512,
        num_persistent: int = 4,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        memory: dict | None = None,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self.attention = AttentionBranch(
            hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            position=position,
            num_persistent=num_persistent,
            qk_norm=qk_norm,
            qk_norm_eps=norm_eps,
        )
        self.memory = build_memory(memory, hidden_size)
        self.hidden_size, self.window = hidden_size, window
        self.num_heads, self.num_kv_heads = num_heads, self.attention.num_kv_heads
        self.head_dim = self.attention.head_dim
        self.build_joint(norm_eps)

    def build_joint(self, norm_eps: float) -> None:
        """Build what `join` needs besides."""
        raise NotImplementedError

    def join(
        self, hidden_states: Tensor, attend: Callable[[Tensor], Tensor], remember: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`; both functions do so too, and each is called once."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, state: TitansState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, TitansState | None]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the state after each row's last real token."""
        past = (None, None) if state is None else (state.keys, state.values)
        run = self.attention.over_window, self.memory.forward
        output, kept, memory = self._run(hidden_states, past, state, sequence, *run)
        if kept is None:
            return output, None
        return output, TitansState(keys=kept[0], values=kept[1], **vars(memory))

    def forward_reference(
        self, hidden_states: Tensor, state: Any = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, tuple]:
        """Do what `forward` does, a token at a time; the state is the `History` of every row, and the memory's."""
        past, memory = (None, None) if state is None else state
        run = self.attention.over_window_reference, self.memory.forward_reference
        output, *state = self._run(hidden_states, past, memory, sequence, *run)
        return output, tuple(state)

    def _run(self, hidden_states, past, memory, sequence, attend, remember) -> tuple[Tensor, Any, Any]:
        """The output, and what both branches hand on to the next call."""
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        after: dict[str, Any] = {}

        def attended(x: Tensor) -> Tensor:
            output, after["past"] = attend(x, past, self.window, sequence)
            return output

        def remembered(x: Tensor) -> Tensor:
            output, after["memory"] = remember(x, memory, sequence)
            return output

        output = self.join(hidden_states, attended, remembered)
        return output, after["past"], after["memory"]

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one row and type of each state tensor; the same after any number of tokens."""
        shape = (self.num_kv_heads, self.window - 1, self.head_dim)
        return self.memory.state_spec(num_tokens, dtype) | {"keys": (shape, dtype), "values": (shape, dtype)}

    def state_size(self, num_tokens: int) -> int:
        """Elements of one row's state."""
        return sum(torch.Size(shape).numel() for shape, _ in self.state_spec(num_tokens, torch.float32).values())
