"""The memories by name, for every mixer that has an option `memory`."""

from torch import nn

from .neural_memory import NeuralMemory

MEMORIES = {"neural_memory": NeuralMemory}


def build_memory(memory: dict | None, hidden_size: int, segment_size: int | None = None) -> nn.Module:
    """Build what an option `memory` asks for; `None` is a neural memory with its defaults.

    Args:
        memory: `{"name": "neural_memory", option: value, ...}`.
        hidden_size: Width D.
        segment_size: The memory's `chunk_size`, in a mixer whose segments are the chunks.

    Raises:
        ValueError: The memory refused an option; the message starts with `memory.`.
    """
    options = {"name": "neural_memory"} if memory is None else dict(memory)
    if segment_size is not None:
        if options.get("chunk_size") not in (None, segment_size):
            raise ValueError(
                f"memory.chunk_size={options['chunk_size']} must be null or segment_size={segment_size}: the memory "
                "moves on when a segment closes"
            )
        options["chunk_size"] = segment_size
    try:
        return MEMORIES[options.pop("name")](hidden_size, **options)
    except ValueError as error:
        raise ValueError(f"memory.{error}") from error
