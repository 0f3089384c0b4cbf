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
from .cache_layer import HybridCacheLayer, SpanCache
from .masks import SequenceInfo, compiling
from .record import Stream, Undo
from .stream import UNKNOWN, RowState

DEFAULT_RECORD_WINDOW = 64


class HybridCache(Cache):
    """The exact state of a hybrid model: made by `model.new_cache()` or by `generate` itself.

    Args:
        layers: One `HybridCacheLayer` a layer.
        spans: One `SpanCache` a span.
        signature: Names the architecture; a model refuses a cache with another one.
        batch_size: B, or `None` to learn it from the first call.
        max_length: Slots of a static cache; `None` lets it grow.
        record_window: Tokens that `crop` can take back while the past is recorded.
    """

    def __init__(
        self,
        layers: list[HybridCacheLayer],
        spans: list[SpanCache] | None = None,
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
        self.device = torch.device("cpu")
        self.recording = False
        self.drafting = False  # in assisted decoding, whose first call comes with the whole text
        self.num_calls = 0
        self._batch_size = batch_size
        self.stream = Stream(is_static=max_length is not None)
        self.spans = [] if spans is None else spans
        self._share_entries()

    def _share_entries(self) -> None:
        """Tell every stream the entries that advance with it."""
        inside = {number: span for span in self.spans for number in span.layers}  # the innermost comes last
        for number, layer in enumerate(self.layers):
            stream = inside[number].stream if number in inside else self.stream
            stream.entries += layer.entries
        for span in self.spans:
            self._around(span).entries += span.entries

    def _around(self, span: SpanCache) -> Stream:
        """The stream from which a span takes its tokens."""
        return self.stream if span.parent is None else self.spans[span.parent].stream

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
        entries = [entry for layer in self.layers for entry in layer.entries]
        return not self.spans and all(isinstance(entry, AttentionEntry) for entry in entries)

    @property
    def num_columns(self) -> int:
        """Columns of the stream so far, pads included."""
        return int(self._columns)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was seen."""
        return self.num_columns > 0

    @property
    def rows(self) -> RowState | None:
        """Where the rows of the whole stream stand; `None` before the first call."""
        return self.stream.rows

    @property
    def streams(self) -> list[Stream]:
        """The stream of all tokens, then those of the spans."""
        return [self.stream, *(span.stream for span in self.spans)]

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
        return sum(t.nbytes for part in (*self.layers, *self.spans) for t in part.named_tensors().values())

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
        return self.stream.start_rows(batch, device)

    def plan(self, sequence: SequenceInfo) -> None:
        """Decide where the checkpoints of this call lie, before its layers run.

        Raises:
            ValueError: A row does not fit into a static cache.
        """
        if self.is_static and sequence.doc_start is not None and not compiling():
            for number, span in enumerate(self.spans):
                if span.max_length < self.max_length:  # the bound of one document; those of many may add up to more
                    raise ValueError(
                        f"past_key_values: a static cache has room for one document a row inside span {number} "
                        f"({span.max_length} of {self.max_length} tokens); use the default cache for packed rows"
                    )
        if self.is_static and not compiling() and self.num_columns + sequence.num_tokens > self.max_length:
            new = sequence.num_tokens if sequence.lengths is None else sequence.lengths
            longest = int((new + (sequence.index[:, 0] if sequence.num_past is None else sequence.num_past)).max())
            if longest > self.max_length:
                raise ValueError(f"past_key_values: {longest} tokens do not fit into max_length={self.max_length}")
        if self.rows is None:  # the first call that was accepted
            self.device = sequence.index.device
            if self.is_static:
                self._columns = torch.zeros((), dtype=torch.long, device=self.device)
                torch._dynamo.mark_static_address(self._columns)
        self.stream.plan(sequence, self.record_window)

    def commit(self, num_columns: int, real: Tensor | None, sequence: SequenceInfo, rows: RowState) -> None:
        """Take note of a call after its layers ran."""
        self.stream.commit(self.num_calls, num_columns, real, sequence, rows)
        self.num_calls += self.recording  # a number that changes in every call would compile every call anew
        self._columns += num_columns

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
        self.recording = True
        for stream in self.streams:
            stream.begin_record(self.num_calls)

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
        rows = RowState(rows.num_tokens - count, rows.doc_start, position, segment, length, True)
        self.stream.apply(Undo([], rows, None, None))
        self._columns -= count

    def _crop_recorded(self, count: int) -> None:
        calls, left, partial, kept = self.stream.calls, count, None, None
        first_dropped = self.num_calls
        for call in reversed(calls):
            if left < call.num_columns:
                break
            left, first_dropped = left - call.num_columns, call.serial
        if left:
            partial = first_dropped - 1
            columns = next((call.num_columns for call in calls if call.serial == partial), 0)
            kept = torch.full((self.batch_size,), columns - left, device=self.rows.num_tokens.device)
        try:
            undone = [self.stream.undo(first_dropped, partial, kept)]
            for span in self.spans:
                around = undone[0 if span.parent is None else span.parent + 1].num_kept
                undone.append(span.stream.undo(first_dropped, None if around is None else partial, around))
        except ValueError as error:
            raise ValueError(
                f"crop: cannot take back {count} tokens, the record does not reach so far; raise record_window "
                f"({self.record_window})"
            ) from error
        for stream, undo in zip(self.streams, undone, strict=True):
            stream.apply(undo)
        self._columns -= count
        self.num_calls = first_dropped

    def _map_rows(self, function: Any) -> None:
        if self.rows is None:
            return
        for span in self.spans:
            span.map(function)
        for stream in self.streams:
            stream.map(function)
        # recorded calls are undone as whole batches: after a move of rows, only what follows can be taken back
        if self.recording:
            self.recording = False
            self.activate_past_recording()

    def _settle(self) -> None:
        if any(getattr(entry, "stale", False) for stream in self.streams for entry in stream.entries):
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
        for span in self.spans:
            span.reset()
        for stream in self.streams:
            stream.reset()
        self.num_calls = 0
        self._columns = self._columns.zero_() if isinstance(self._columns, Tensor) else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "HybridCache":
        def detach(tensor: Tensor) -> Tensor:  # PyTorch refuses to copy a tensor that knows where it came from
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
            return tensor

        for part in (*self.layers, *self.spans):
            part.map(detach)
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
            for number, part in self.parts().items()
            for name, tensor in part.named_tensors().items()
        }
        facts = {"signature": self.signature, "num_columns": self.num_columns, "max_length": self.max_length}
        facts["rows"] = []
        for number, stream in enumerate(self.streams):
            known = dataclasses.asdict(stream.rows) if stream.rows is not None else None
            for name in [name for name, value in (known or {}).items() if isinstance(value, Tensor)]:
                tensors[f"rows{number}.{name}"] = known.pop(name)
            facts["rows"].append(known)
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
        numbered, tensors = self.parts(), load_file(Path(folder) / "cache.safetensors")
        for name in tensors:  # copies: a memory-mapped file is not aligned as a product likes it
            part = numbered.get(name.partition(".")[0])
            tensors[name] = tensors[name].to(self.device if part is None else part.device, copy=True)
        self._columns = facts["num_columns"]
        for number, (stream, known) in enumerate(zip(self.streams, facts["rows"], strict=True)):
            prefix = f"rows{number}."
            rows = {name[len(prefix) :]: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            stream.rows = None if known is None else RowState(**rows, **known)
        if self.is_static and self.rows is not None:
            self._columns = torch.tensor(self._columns, device=self.rows.num_tokens.device)
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, half, leaf = name.split(".", 2)
            parts.setdefault((number, half), {})[leaf] = tensor
        for (number, half), state in parts.items():
            getattr(numbered[number], half).load(state)

    def parts(self) -> dict[str, Any]:
        """What layers (`"0"`, ...) and spans (`"span0"`, ...) keep, by name."""
        layers = {str(number): layer for number, layer in enumerate(self.layers)}
        return layers | {f"span{number}": span for number, span in enumerate(self.spans)}
