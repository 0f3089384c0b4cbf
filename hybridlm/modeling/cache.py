"""The state of a hybrid model between calls: one entry a layer, rows that may be padded, packed, copied and rolled back.

Keys and values sit at the index of their token (the number of real tokens before it in its row), so pads take no place
in them and never need a mask. Every other state is a dataclass of tensors that its mixer returns.

Rollback: while the past is recorded, an entry keeps a checkpoint state and the inputs its mixer was given since. `crop`
drops inputs; the next call runs the mixer over the rest. Full attention needs no record: its keys are simply forgotten.

Shapes: B batch, T new tokens, S key slots, G key-value heads, K head width.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .masks import SequenceInfo, join
from .stream import UNKNOWN, RowState

DEFAULT_RECORD_WINDOW = 64


class KeyValueStore:
    """Keys and values of all real tokens of every row, in buffers that grow by doubling or have a fixed length.

    Args:
        max_length: Slots of a static store; `None` lets it grow.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.keys: Tensor | None = None  # [B, G, capacity, K]
        self.values: Tensor | None = None
        self.length = 0  # slots in use: tokens of the longest row, or a little more where rows are padded

    def append(self, keys: Tensor, values: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Add the keys and values `[B, G, T, K]` of a call.

        Returns:
            All keys and values `[B, G, S, K]`; the slot of a token is its index.

        Raises:
            ValueError: A static store is too short.
        """
        tracked = torch.is_grad_enabled() and (keys.requires_grad or (self.keys is not None and self.keys.requires_grad))
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
        self.length = new_length
        return self.keys[:, :, :new_length], self.values[:, :, :new_length]

    def _append_static(self, keys: Tensor, values: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            shape = (*keys.shape[:2], self.max_length, keys.shape[3])
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros((*shape[:3], values.shape[3]))
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        uniform = sequence.uniform_past
        if uniform is not None and uniform + keys.shape[2] > self.max_length:
            raise ValueError(f"cache: {uniform + keys.shape[2]} tokens do not fit in max_length={self.max_length}")
        slots = sequence.index[:, None, :, None].clamp(max=self.max_length - 1)  # [B, 1, T, 1]
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
    """The cache entry of a part whose state is a `KeyValueStore`."""

    def __init__(self, max_length: int | None = None) -> None:
        self.state = KeyValueStore(max_length)
        self.is_static = max_length is not None

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
            self.state = KeyValueStore(self.state.max_length)

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

    def run(self, module: nn.Module, hidden_states: Tensor, sequence: SequenceInfo) -> Tensor:
        """Apply the module to `[B, T, D]` and keep its state."""
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
            self.inputs.append((piece.detach(), part))
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

    def _replay(self, module: nn.Module) -> None:
        """Compute the state after the recorded inputs."""
        state, pending = self.mark, self.inputs[self.num_marked :]
        if len(pending) > 1 and all(call.lengths is None for _, call in pending):
            pending = [(torch.cat([x for x, _ in pending], dim=1), join([call for _, call in pending]))]
        with torch.no_grad():
            for hidden_states, call in pending:
                state = module(hidden_states, state, call)[1]
        self.state, self.stale = state, False

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by name."""
        return {} if self.state is None else _fields(self.state)

    def map(self, function: Any) -> None:
        """Replace every tensor by `function(tensor)`."""
        states = {id(state): state for state in (self.state, self.base, self.mark) if state is not None}
        new = {key: type(state)(**{n: function(t) for n, t in _fields(state).items()}) for key, state in states.items()}
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


def _fields(state: Any) -> dict[str, Tensor]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if getattr(state, f.name) is not None}


class HybridCacheLayer(CacheLayerMixin):
    """The entries of one layer, in the form that transformers' tools expect.

    Args:
        mixer: Entry of the mixer, or `None`.
        channel_mixer: Entry of the channel mixer, or `None`.
    """

    def __init__(self, mixer: Any = None, channel_mixer: Any = None) -> None:
        self.mixer, self.channel_mixer = mixer, channel_mixer
        self.cache: HybridCache | None = None

    @property
    def entries(self) -> list[Any]:
        """The entries that exist."""
        return [entry for entry in (self.mixer, self.channel_mixer) if entry is not None]

    def named_tensors(self) -> dict[str, Tensor]:
        """Live tensors, named `mixer.keys` and so on."""
        halves = {"mixer": self.mixer, "channel_mixer": self.channel_mixer}
        return {
            f"{half}.{name}": tensor
            for half, entry in halves.items()
            if entry is not None
            for name, tensor in entry.tensors().items()
        }

    def _tensor(self, name: str) -> Tensor | None:
        return None if self.mixer is None else self.mixer.tensors().get(name)

    keys = property(lambda self: self._tensor("keys"))
    values = property(lambda self: self._tensor("values"))
    conv_states = property(lambda self: self._tensor("conv_states"))
    recurrent_states = property(lambda self: self._tensor("recurrent_states"))
    is_initialized = property(lambda self: bool(self.named_tensors()) or not self.entries)
    is_compileable = property(lambda self: self.cache.is_static)
    is_croppable = property(lambda self: self.cache.is_croppable)
    is_sliding = False
    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: entries are filled by their mixers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: a hybrid cache is filled by the model it was made for."""
        raise NotImplementedError("HybridCache is filled by its own model; other models need their own cache")

    def get_seq_length(self) -> int:
        """Columns of the stream so far, pads included."""
        return self.cache.num_columns

    def get_max_length(self) -> int:
        """Slots of a static cache, else -1."""
        return self.cache.max_length if self.cache.is_static else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns a query may see."""
        return self.cache.num_columns + query_length, 0

    def map(self, function: Any) -> None:
        """Replace every tensor by `function(tensor)`."""
        for entry in self.entries:
            entry.map(function)

    def reset(self) -> None:
        """Forget everything."""
        for entry in self.entries:
            entry.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows."""
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, max_length: int) -> None:
        """Refuse: rows are rolled back for all layers at once, by `HybridCache.crop`."""
        raise NotImplementedError("crop the whole HybridCache, not one layer of it")

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        self.map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to where the cache lives."""
        self.map(lambda tensor: tensor.to(self.cache.device, non_blocking=True))


@dataclasses.dataclass
class RecordedCall:
    """One call that `crop` can undo: its columns, the real ones among them, and the rows before it."""

    num_columns: int
    real: Tensor | None  # [B, columns]
    sequence: SequenceInfo
    offset: int  # compacted tokens of the call that lie before `sequence`
    before: RowState


class HybridCache(Cache):
    """The exact state of a hybrid model: made by `model.new_cache()` or by `generate` itself.

    Args:
        layers: One `HybridCacheLayer` a layer.
        signature: Names the architecture; a model refuses a cache with another one.
        batch_size: B, or `None` to learn it from the first call.
        max_length: Slots of a static cache; `None` lets it grow.
        record_window: Tokens that `crop` can take back while the past is recorded.
    """

    def __init__(
        self,
        layers: list[HybridCacheLayer],
        signature: str = "",
        batch_size: int | None = None,
        max_length: int | None = None,
        record_window: int = DEFAULT_RECORD_WINDOW,
    ) -> None:
        super().__init__(layers=layers)
        for layer in layers:
            layer.cache = self
        self.signature = signature
        self.max_length = max_length
        self.record_window = record_window
        self.num_columns = 0
        self.rows: RowState | None = None
        self.device = torch.device("cpu")
        self.recording = False
        self.calls: list[RecordedCall] = []
        self.num_marked = 0
        self._batch_size = batch_size

    @property
    def is_static(self) -> bool:
        """Whether every tensor keeps its address and shape."""
        return self.max_length is not None

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the decoding step."""
        return self.is_static

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens back now."""
        return not self.is_static and (self.recording or self._keys_only)

    @property
    def _keys_only(self) -> bool:
        return all(isinstance(entry, AttentionEntry) for layer in self.layers for entry in layer.entries)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was seen."""
        return self.num_columns > 0

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first call."""
        if self.rows is not None:
            return self.rows.num_tokens.shape[0]
        return -1 if self._batch_size is None else self._batch_size

    @property
    def seen_tokens(self) -> Tensor | None:
        """Real tokens of each row, `[B]`."""
        return None if self.rows is None else self.rows.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the live state, the record of the past left out."""
        return sum(t.nbytes for layer in self.layers for t in layer.named_tensors().values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the stream so far, pads included."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots of a static cache, else -1."""
        return self.max_length if self.is_static else -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the columns a query may see."""
        return self.num_columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was seen."""
        return self.num_columns > 0

    def start_rows(self, batch: int, device: torch.device) -> RowState:
        """Where the rows stand, for a call of `batch` rows.

        Raises:
            ValueError: The cache holds another number of rows.
        """
        expected = self.batch_size
        if expected not in (-1, batch):
            raise ValueError(f"past_key_values: holds {expected} rows, got a batch of {batch}")
        if self.rows is None:
            self.rows, self.device = RowState.fresh(batch, device), device
        return self.rows

    def plan(self, sequence: SequenceInfo) -> None:
        """Decide where the checkpoints of this call lie, before its layers run."""
        if not self.recording:
            return
        shortest = sequence.num_tokens if sequence.lengths is None else int(sequence.lengths.min())
        split = shortest - self.record_window
        if split > 0:
            sequence.parts = [sequence.narrow(0, split), sequence.narrow(split, sequence.num_tokens)]
        elif sum(call.num_columns for call in self.calls[self.num_marked :]) >= self.record_window:
            sequence.promote = True

    def commit(self, num_columns: int, real: Tensor | None, sequence: SequenceInfo, rows: RowState) -> None:
        """Take note of a call after its layers ran."""
        if self.recording:
            if sequence.promote:
                self.calls = self.calls[self.num_marked :]
                self.num_marked = len(self.calls)
            part, offset = sequence, 0
            if sequence.parts:
                part, offset = sequence.parts[-1], sequence.parts[0].num_tokens
                self.calls, self.num_marked = [], 0
            self.calls.append(RecordedCall(num_columns, real, part, offset, self.rows))
        self.num_columns += num_columns
        if self.is_static:
            for name in ("num_tokens", "doc_start", "last_position", "last_segment"):
                getattr(self.rows, name).copy_(getattr(rows, name))
            self.rows.uniform = None  # a number that changes every step would compile a new graph every step
            self.rows.one_document = rows.one_document
        else:
            self.rows = rows

    def activate_past_recording(self, window: int | None = None) -> None:
        """Keep what `crop` needs from now on.

        Args:
            window: Tokens that `crop` must be able to take back; `record_window` when `None`.

        Raises:
            ValueError: The cache is static.
        """
        if self.is_static:
            raise ValueError("cache: a static cache cannot record its past; use the default cache")
        self.record_window = max(self.record_window, window or 0)
        if self.recording:
            return
        self.recording, self.calls, self.num_marked = True, [], 0
        for layer in self.layers:
            for entry in layer.entries:
                entry.begin_record()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns of every row.

        Args:
            tokens_to_remove: `-k` takes back k columns; 0 does nothing.

        Raises:
            ValueError: A positive number, or more columns than were recorded; nothing is changed then.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"crop: expected 0 or -k to take back k tokens, got {-count}")
        if count > self.num_columns:
            raise ValueError(f"crop: cannot take back {count} of {self.num_columns} tokens")
        if count == 0:
            return
        if not self.is_croppable:
            raise ValueError(
                "crop: this cache holds recurrent or windowed state and does not record its past; call "
                "cache.activate_past_recording() before the tokens are fed"
            )
        if self.recording:
            self._crop_recorded(count)
        else:
            self._crop_keys(count)

    def _crop_keys(self, count: int) -> None:
        rows = self.rows
        if rows.uniform is None or not rows.one_document:
            raise ValueError(
                "crop: rows with pads or packed documents can be taken back only while the past is recorded; "
                "call cache.activate_past_recording() first"
            )
        unknown = torch.full_like(rows.last_position, UNKNOWN)
        length = rows.uniform - count
        self.rows = RowState(rows.num_tokens - count, rows.doc_start, unknown, unknown, length, True)
        self._rollback(0, None, length, count)

    def _crop_recorded(self, count: int) -> None:
        keep, left = len(self.calls), count
        while keep and left >= self.calls[keep - 1].num_columns:
            left -= self.calls[keep - 1].num_columns
            keep -= 1
        shortened, rows = None, self.calls[keep].before if keep < len(self.calls) else self.rows
        if left and not keep:
            raise ValueError(
                f"crop: cannot take back {count} tokens, the record reaches {count - left} back; "
                f"raise record_window ({self.record_window})"
            )
        # the oldest call may have been cut: what lies before `offset` was not recorded
        if keep == 0 and self.calls and self.calls[0].offset:
            raise ValueError(f"crop: cannot take back {count} tokens; raise record_window ({self.record_window})")
        calls = self.calls[:keep]
        if left:
            call = calls[-1]
            shortened, rows = self._shorten(call, left)
            real = None if call.real is None else call.real[:, : call.num_columns - left]
            calls[-1] = dataclasses.replace(call, num_columns=call.num_columns - left, real=real, sequence=shortened)
        self.calls, self.rows = calls, rows
        length = int(rows.num_tokens.max()) if rows.uniform is None else rows.uniform
        self._rollback(keep, shortened, length, count)
        if self.num_marked > keep - bool(left):
            self.num_marked = 0
            for layer in self.layers:
                for entry in layer.entries:
                    entry.drop_mark()

    def _shorten(self, call: RecordedCall, count: int) -> tuple[SequenceInfo, RowState]:
        """The recorded part of a call without its last `count` columns, and the rows after that."""
        sequence, batch = call.sequence, call.before.num_tokens.shape[0]
        device = call.before.num_tokens.device
        if call.real is None:
            removed = torch.full((batch,), count, device=device)
        else:
            removed = call.real[:, -count:].sum(1)
        available = sequence.num_tokens if sequence.lengths is None else sequence.lengths
        if bool((removed > available).any()):
            raise ValueError(f"crop: cannot take back {count} tokens; raise record_window ({self.record_window})")
        uniform = call.real is None and sequence.lengths is None
        shorter = sequence.head(sequence.num_tokens - count) if uniform else sequence.shorten(removed)
        lengths = torch.as_tensor(available, device=device).expand(batch) - removed
        last = (lengths - 1).clamp(min=0)[:, None]

        def at_end(values: Tensor | None, before: Tensor) -> Tensor:
            if values is None:
                return before
            return torch.where(lengths > 0, values.expand(batch, -1).gather(1, last)[:, 0], before)

        base = sequence.num_past if sequence.num_past is not None else torch.zeros_like(lengths)
        past_start = sequence.past_doc_start if sequence.past_doc_start is not None else call.before.doc_start
        past, before = sequence.uniform_past, call.before.last_position
        rows = RowState(
            num_tokens=base + lengths,
            doc_start=at_end(sequence.doc_start, past_start),
            last_position=at_end(sequence.positions, torch.full_like(lengths, UNKNOWN) if call.offset else before),
            last_segment=torch.full_like(lengths, UNKNOWN),
            uniform=past + shorter.num_tokens if uniform and past is not None else None,
            one_document=sequence.doc_start is None,
        )
        return shorter, rows

    def _rollback(self, num_calls: int, shortened: SequenceInfo | None, length: int, columns: int) -> None:
        for layer in self.layers:
            for entry in layer.entries:
                entry.rollback(num_calls, shortened, length)
        self.num_columns -= columns

    def _map_rows(self, function: Any) -> None:
        if self.rows is None:
            return
        self.rows = _map_tensors(self.rows, function)
        # recorded calls are undone as whole batches: after a move of rows, only what follows can be taken back
        if self.recording:
            self.recording = False
            self.activate_past_recording()

    def _settle(self) -> None:
        if any(getattr(entry, "stale", False) for layer in self.layers for entry in layer.entries):
            raise ValueError("cache: feed a token after crop before rows are moved or the cache is saved")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows, for beam search."""
        self._settle()
        super().reorder_cache(beam_idx)
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._settle()
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._settle()
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forget everything; a static cache keeps its tensors."""
        super().reset()
        self.num_columns, self.calls, self.num_marked = 0, [], 0
        if self.is_static and self.rows is not None:
            self.rows.num_tokens.zero_()
            self.rows.doc_start.zero_()
            self.rows.last_position.fill_(-1)
            self.rows.last_segment.fill_(UNKNOWN)
            self.rows.uniform, self.rows.one_document = 0, True
        else:
            self.rows = None

    def snapshot(self) -> "HybridCache":
        """A copy that later calls do not change."""
        return copy.deepcopy(self)

    def restore(self, snapshot: "HybridCache") -> None:
        """Return to a snapshot, which stays usable.

        Raises:
            ValueError: The snapshot is of another architecture.
        """
        if snapshot.signature != self.signature:
            raise ValueError("snapshot: was taken from a model with another config")
        self.__dict__.update(copy.deepcopy(snapshot).__dict__)
        for layer in self.layers:
            layer.cache = self

    def save(self, folder: str | Path) -> None:
        """Write the state to `folder` (safetensors and JSON); the record of the past is not kept."""
        from safetensors.torch import save_file

        self._settle()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{number}.{name}": tensor.contiguous()
            for number, layer in enumerate(self.layers)
            for name, tensor in layer.named_tensors().items()
        }
        facts = {"signature": self.signature, "num_columns": self.num_columns, "max_length": self.max_length}
        if self.rows is not None:
            for item in dataclasses.fields(self.rows):
                value = getattr(self.rows, item.name)
                if isinstance(value, Tensor):
                    tensors[f"rows.{item.name}"] = value
                else:
                    facts[item.name] = value
        save_file(tensors, folder / "cache.safetensors")
        (folder / "cache.json").write_text(json.dumps(facts))

    def load(self, folder: str | Path) -> None:
        """Take over a state that `save` wrote.

        Raises:
            ValueError: It belongs to another architecture or another kind of cache.
        """
        from safetensors.torch import load_file

        facts = json.loads((Path(folder) / "cache.json").read_text())
        for name, mine in (("signature", self.signature), ("max_length", self.max_length)):
            if facts.pop(name) != mine:
                raise ValueError(f"{folder}: was saved from a cache with another {name}")
        tensors = load_file(Path(folder) / "cache.safetensors")
        self.num_columns = facts.pop("num_columns")
        rows = {name[5:]: tensors.pop(name) for name in list(tensors) if name.startswith("rows.")}
        self.rows = RowState(**rows, **facts) if rows else None
        parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, half, leaf = name.split(".", 2)
            parts.setdefault((int(number), half), {})[leaf] = tensor
        for (number, half), state in parts.items():
            getattr(self.layers[number], half).load(state)


def _map_tensors(value: Any, function: Any) -> Any:
    """A dataclass with `function` applied to its tensors."""
    changes = {
        f.name: function(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if isinstance(getattr(value, f.name), Tensor)
    }
    return dataclasses.replace(value, **changes)
