"""What a layer keeps between calls: keys and values by index, or a dataclass of tensors with a record of inputs.

Keys and values sit at the index of their token (the number of real tokens before it in its row), so pads take no place
in them and never need a mask. Every other state is a dataclass of tensors that its mixer returns.

Rollback: while the past is recorded, an entry keeps a checkpoint state and the inputs its mixer was given since. `crop`
drops inputs; the next call runs the mixer over the rest. Full attention needs no record: its keys are simply
forgotten. A convolution in front of it does, and has an entry of its own.

Shapes: B batch, T new tokens, S key slots, G key-value heads, K head width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .masks import SequenceInfo, join


class KeyValueStore:
    """Keys and values of all real tokens of every row, in buffers that grow by doubling or have a fixed length.

    Args:
        max_length: Slots of a static store; `None` lets it grow.
        convolution: Entry of the convolution that the keys and values come from, which the mixer runs; the layer's
            cache looks after it.
    """

    def __init__(self, max_length: int | None = None, convolution: "RecurrentEntry | None" = None) -> None:
        self.max_length, self.convolution = max_length, convolution
        self.keys: Tensor | None = None  # [B, G, capacity, K]
        self.values: Tensor | None = None
        self.length = 0  # slots in use: tokens of the longest row, or a little more where rows are padded

    def append(self, keys: Tensor, values: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Add the keys and values `[B, G, T, K]` of a call.

        Returns:
            All keys and values `[B, G, S, K]`; the slot of a token is its index.
        """
        tracked = torch.is_grad_enabled() and (
            keys.requires_grad or (self.keys is not None and self.keys.requires_grad)
        )
        new_length = self.length + keys.shape[2]
        if self.max_length is not None:
            return self._append_static(keys, values, sequence)
        if self.length == 0:
            self.keys, self.values = keys, values
        elif tracked:
            self.keys = self._joined(self.keys, keys, sequence, new_length)
            self.values = self._joined(self.values, values, sequence, new_length)
        else:
            self._reserve(new_length)
            self._write(self.keys, keys, sequence)
            self._write(self.values, values, sequence)
        self.length = self._length_after(new_length, sequence)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    @staticmethod
    def _length_after(most: int, sequence: SequenceInfo) -> int:
        """Slots of the longest row; inside a span rows take turns, and a slot a call would be many more than that."""
        if sequence.passage is None or (sequence.lengths is None and sequence.uniform_past is not None):
            return most
        if "longest" not in sequence.memo:
            past = 0 if sequence.num_past is None else sequence.num_past
            new = sequence.num_tokens if sequence.lengths is None else sequence.lengths
            sequence.memo["longest"] = max(int((past + new).max()), 1)  # a pad alone attends to its own slot
        return sequence.memo["longest"]

    def _append_static(self, keys: Tensor, values: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            # one slot to spare: what follows the last real token of a full row goes there, and no query sees it
            shape = (*keys.shape[:2], self.max_length + 1, keys.shape[3])
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros((*shape[:3], values.shape[3]))
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        slots = sequence.index[:, None, :, None].clamp(max=self.max_length)  # [B, 1, T, 1]
        self.keys.scatter_(2, slots.expand_as(keys), keys)
        self.values.scatter_(2, slots.expand_as(values), values)
        return self.keys, self.values

    def _reserve(self, length: int) -> None:
        """Own buffers of at least `length` slots."""
        capacity = self.keys.shape[2]
        if capacity >= length and capacity > self.length:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], max(2 * self.length, length, 64), old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            new[:, :, self.length :] = 0  # an unread slot must hold a number: 0 weight times NaN is NaN
            setattr(self, name, new)

    @staticmethod
    def _write(buffer: Tensor, new: Tensor, sequence: SequenceInfo) -> None:
        past = sequence.uniform_past
        if past is not None:
            buffer[:, :, past : past + new.shape[2]] = new
        else:
            buffer.scatter_(2, sequence.index[:, None, :, None].expand_as(new), new)

    @staticmethod
    def _joined(old: Tensor, new: Tensor, sequence: SequenceInfo, length: int) -> Tensor:
        """The same as `_write`, in a new tensor that remembers where it came from."""
        past = sequence.uniform_past
        if past is not None:
            return torch.cat([old[:, :, :past], new], dim=2)
        room = old.new_zeros(*old.shape[:2], max(length - old.shape[2], 0), old.shape[3])
        return torch.cat([old, room], 2).scatter(2, sequence.index[:, None, :, None].expand_as(new), new)

    def tensors(self) -> dict[str, Tensor]:
        """The live part of the buffers, by name."""
        if self.keys is None:
            return {}
        stop = self.keys.shape[2] if self.max_length is not None else self.length
        return {"keys": self.keys[:, :, :stop], "values": self.values[:, :, :stop]}

    def map(self, function: Any) -> None:
        """Replace every tensor by `function(tensor)`."""
        if self.keys is not None:
            self.keys, self.values = function(self.keys), function(self.values)


class AttentionEntry:
    """The cache entry of a part whose state is a `KeyValueStore`.

    Args:
        max_length: Slots of a static store; `None` lets it grow.
        convolution: A second entry of the same part, beside this one in the cache (see `HybridCacheLayer`).
    """

    def __init__(self, max_length: int | None = None, convolution: "RecurrentEntry | None" = None) -> None:
        self.state = KeyValueStore(max_length, convolution)
        self.is_static = max_length is not None

    @property
    def convolution(self) -> "RecurrentEntry | None":
        """The entry beside this one."""
        return self.state.convolution

    def run(self, module: nn.Module, hidden_states: Tensor, sequence: SequenceInfo) -> Tensor:
        """Apply the module to `[B, T, D]` and keep its keys and values."""
        return module(hidden_states, self.state, sequence)[0]

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by name."""
        return self.state.tensors()

    def map(self, function: Any) -> None:
        """Replace every tensor by `function(tensor)`."""
        self.state.map(function)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors()` gave."""
        self.state.keys, self.state.values = tensors["keys"], tensors["values"]
        self.state.length = 0 if self.is_static else tensors["keys"].shape[2]

    def reset(self) -> None:
        """Forget everything."""
        if self.is_static and self.state.keys is not None:
            self.map(lambda tensor: tensor.zero_())
        else:
            self.state = KeyValueStore(self.state.max_length, self.convolution)

    def begin_record(self) -> None:
        """Keys are never overwritten, so there is nothing to keep."""

    def rollback(self, num_calls: int, shortened: SequenceInfo | None, length: int) -> None:
        """Forget all but the first `length` slots."""
        self.state.length = length

    def drop_mark(self) -> None:
        """There is no checkpoint."""


class RecurrentEntry:
    """The cache entry of a part whose state is a dataclass of tensors.

    Args:
        state_type: The dataclass, to rebuild a state from a file.
        static: Write new states into the same tensors, for compiled decoding.
    """

    def __init__(self, state_type: type | None = None, static: bool = False) -> None:
        self.state_type = state_type
        self.is_static = static
        self.state: Any = None
        self.recording = False
        self.base: Any = None  # the state before the first recorded input
        self.mark: Any = None  # the state before the input number `num_marked`
        self.num_marked = 0
        self.inputs: list[tuple[Tensor, SequenceInfo]] = []
        self.stale = False  # `crop` removed inputs that `state` still counts in

    def run(self, module: Callable, hidden_states: Tensor, sequence: SequenceInfo) -> Tensor:
        """Apply the module, or a part of one, to `[B, T, D]` and keep its state."""
        if not self.recording:
            output, state = module(hidden_states, self.state, sequence)
            self._keep(state)
            return output
        if self.stale:
            self._replay(module)
        if sequence.promote:
            self.base, self.inputs = self.mark, self.inputs[self.num_marked :]
            self.mark, self.num_marked = self.state, len(self.inputs)
        outputs, start = [], 0
        for part in sequence.parts or [sequence]:
            piece = hidden_states[:, start : start + part.num_tokens]
            if start:  # the checkpoint falls inside this call
                self.base = self.mark = self.state
                self.inputs, self.num_marked = [], 0
            output, self.state = module(piece, self.state, part)
            # a view would keep all of a long call alive
            self.inputs.append((piece.detach().clone() if start else piece.detach(), part))
            outputs.append(output)
            start += part.num_tokens
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _keep(self, state: Any) -> None:
        if not self.is_static or self.state is None:
            self.state = state
            if self.is_static:
                self.map(lambda tensor: tensor.clone())
                for tensor in self.tensors().values():
                    torch._dynamo.mark_static_address(tensor)
            return
        for name, tensor in self.tensors().items():
            tensor.copy_(getattr(state, name))

    def _replay(self, module: Callable) -> None:
        """Compute the state after the recorded inputs."""
        state = self.mark
        pending = [(x, call.to(x.device)) for x, call in self.inputs[self.num_marked :] if call.num_tokens]
        if len(pending) > 1 and all(call.lengths is None for _, call in pending):
            pending = [(torch.cat([x for x, _ in pending], dim=1), join([call for _, call in pending]))]
        with torch.no_grad():
            for hidden_states, call in pending:
                state = module(hidden_states, state, call)[1]
        self.state, self.stale = state, False

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by name."""
        return {} if self.state is None else fields_of(self.state)

    def map(self, function: Any) -> None:
        """Replace every tensor by `function(tensor)`."""
        states = {id(state): state for state in (self.state, self.base, self.mark) if state is not None}
        new = {
            key: type(state)(**{n: function(t) for n, t in fields_of(state).items()}) for key, state in states.items()
        }
        for name in ("state", "base", "mark"):
            if getattr(self, name) is not None:
                setattr(self, name, new[id(getattr(self, name))])

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors()` gave."""
        self.state = self.state_type(**tensors)

    def reset(self) -> None:
        """Forget everything."""
        if self.is_static and self.state is not None:
            self.map(lambda tensor: tensor.zero_())
            return
        recording = self.recording
        self.__init__(self.state_type, self.is_static)
        self.recording = recording

    def begin_record(self) -> None:
        """Make the present state the checkpoint."""
        self.recording = True
        self.base = self.mark = self.state
        self.inputs, self.num_marked, self.stale = [], 0, False

    def rollback(self, num_calls: int, shortened: SequenceInfo | None, length: int) -> None:
        """Keep `num_calls` recorded calls; `shortened` replaces the last one."""
        self.inputs = self.inputs[:num_calls]
        if shortened is not None:
            self.inputs[-1] = (self.inputs[-1][0][:, : shortened.num_tokens], shortened)
        self.stale = True

    def drop_mark(self) -> None:
        """Fall back on the older checkpoint."""
        self.mark, self.num_marked = self.base, 0


def fields_of(state: Any) -> dict[str, Tensor]:
    """The tensors of a state, by name."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if getattr(state, f.name) is not None}
