"""The state of a hybrid model between calls: one entry a layer, rows that may be padded, packed and rolled back.

Shapes: B batch, T new tokens.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache_entries import AttentionEntry
from .cache_layer import HybridCacheLayer
from .masks import SequenceInfo, compiling
from .stream import UNKNOWN, RowState

DEFAULT_RECORD_WINDOW = 64


@dataclasses.dataclass
class RecordedCall:
    """One call that `crop` can undo: its columns, the real ones among them, and the rows before it."""

    num_columns: int
    real: Tensor | None  # [B, columns]
    sequence: SequenceInfo
    offset: int  # compacted tokens of the call that lie before `sequence`
    before: RowState
    positions: Tensor  # of the whole call, as is `seq_idx`
    seq_idx: Tensor | None


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
        self._claim_layers()
        self.signature = signature
        self.max_length = max_length
        self.record_window = record_window
        self._columns: int | Tensor = 0  # a tensor in a static cache: a compiled step must not see a number change
        self.rows: RowState | None = None
        self.device = torch.device("cpu")
        self.recording = False
        self.drafting = False  # in assisted decoding, whose first call comes with the whole text
        self.calls: list[RecordedCall] = []
        self.num_marked = 0
        self._batch_size = batch_size

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._claim_layers()

    def _claim_layers(self) -> None:
        for layer in self.layers:
            layer.cache = self

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
    def num_columns(self) -> int:
        """Columns of the stream so far, pads included."""
        return int(self._columns)

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
        return RowState.fresh(batch, device) if self.rows is None else self.rows

    def _begin(self, batch: int, device: torch.device) -> None:
        """Take the number of rows from the first call that was accepted."""
        self.rows, self.device = RowState.fresh(batch, device), device
        if self.is_static:
            self._columns = torch.zeros((), dtype=torch.long, device=device)
            for tensor in (self._columns, *self.rows.tensors()):
                torch._dynamo.mark_static_address(tensor)

    def plan(self, sequence: SequenceInfo) -> None:
        """Decide where the checkpoints of this call lie, before its layers run.

        Raises:
            ValueError: A row does not fit into a static cache.
        """
        if self.is_static and not compiling() and self.num_columns + sequence.num_tokens > self.max_length:
            new = sequence.num_tokens if sequence.lengths is None else sequence.lengths
            longest = int((new + (sequence.index[:, 0] if sequence.num_past is None else sequence.num_past)).max())
            if longest > self.max_length:
                raise ValueError(f"past_key_values: {longest} tokens do not fit into max_length={self.max_length}")
        if self.rows is None:
            self._begin(sequence.index.shape[0], sequence.index.device)
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
            part.memo.clear()  # masks as wide as the past
            facts = (sequence.positions, sequence.seq_idx)
            self.calls.append(RecordedCall(num_columns, real, part, offset, self.rows, *facts))
        self._columns += num_columns
        if self.is_static:
            for old, new in zip(self.rows.tensors(), rows.tensors(), strict=True):
                old.copy_(new)
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
        length, known = rows.uniform - count, rows.last_position != UNKNOWN
        position = torch.where(known, rows.last_position - count, UNKNOWN)  # in one document they go on by one
        segment = rows.last_segment if length else torch.full_like(rows.last_segment, UNKNOWN)
        self.rows = RowState(rows.num_tokens - count, rows.doc_start, position, segment, length, True)
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

        def at_end(values: Tensor | None, before: Tensor, count: Tensor) -> Tensor:
            if values is None:
                return before
            last = (count - 1).clamp(min=0)[:, None]
            return torch.where(count > 0, values.expand(batch, -1).gather(1, last)[:, 0], before)

        base = sequence.num_past if sequence.num_past is not None else torch.zeros_like(lengths)
        past_start = sequence.past_doc_start if sequence.past_doc_start is not None else call.before.doc_start
        past, kept = sequence.uniform_past, lengths + call.offset
        rows = RowState(
            num_tokens=base + lengths,
            doc_start=at_end(sequence.doc_start, past_start, lengths),
            last_position=at_end(call.positions, call.before.last_position, kept),
            last_segment=at_end(call.seq_idx, call.before.last_segment, kept),
            uniform=past + shorter.num_tokens if uniform and past is not None else None,
            one_document=sequence.doc_start is None,
        )
        return shorter, rows

    def _rollback(self, num_calls: int, shortened: SequenceInfo | None, length: int, columns: int) -> None:
        for layer in self.layers:
            for entry in layer.entries:
                entry.rollback(num_calls, shortened, length)
        self._columns -= columns

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
        self.calls, self.num_marked = [], 0
        if self.is_static and self.rows is not None:
            self._columns.zero_()
            self.rows.num_tokens.zero_()
            self.rows.doc_start.zero_()
            self.rows.last_position.fill_(-1)
            self.rows.last_segment.fill_(UNKNOWN)
            self.rows.uniform, self.rows.one_document = 0, True
        else:
            self.rows, self._columns = None, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "HybridCache":
        def detach(tensor: Tensor) -> Tensor:  # PyTorch refuses to copy a tensor that knows where it came from
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
            return tensor

        for layer in self.layers:
            layer.map(detach)
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

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
        self.__setstate__(copy.deepcopy(snapshot).__dict__)

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
        for name in tensors:  # copies: a memory-mapped file is not aligned as a product likes it
            number = name.partition(".")[0]
            device = self.layers[int(number) if number.isdigit() else 0].device
            tensors[name] = tensors[name].to(device, copy=True)
        self._columns = facts.pop("num_columns")
        rows = {name[5:]: tensors.pop(name) for name in list(tensors) if name.startswith("rows.")}
        self.rows = RowState(**rows, **facts) if rows else None
        if self.is_static and rows:
            self._columns = torch.tensor(self._columns, device=self.rows.num_tokens.device)
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
