"""What every kind of attention does with its heads.

Shapes: B batch, T tokens, H heads, K head width.
"""

from torch import Tensor


def check_heads(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None, dropout: float = 0.0
) -> None:
    """Refuse heads that do not fit together.

    Raises:
        ValueError: The message starts with the option.
    """
    if num_heads < 1 or (head_dim is None and hidden_size % num_heads):
        raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}, or head_dim must be given")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim={head_dim} must be positive")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """`[B, T, H K]` to `[B, H, T, K]`."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """`[B, H, T, K]` to `[B, T, H K]`."""
    return states.transpose(1, 2).flatten(2)
