"""Packing: documents laid end to end in rows of equal length, with the borders kept.

A row has the fields of transformers' `DataCollatorWithFlattening`: `input_ids`, `labels` (-100 at the first token of
every document), `position_ids` (from 0 in every document) and `seq_idx` (number of the document inside its row).
A document that crosses the end of a row goes on in the next one as a document of its own, because a row starts from
an empty state. Nothing is dropped but what does not fill the last row, and that is counted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100


@dataclass
class PackingCounts:
    """What went into the rows.

    Args:
        num_documents: Documents that gave tokens.
        num_empty_documents: Documents without text, left out.
        num_bytes: UTF-8 bytes of their text.
        num_text_tokens: Tokens of their text, without start and end tokens.
        num_tokens: All tokens.
        num_rows: Rows that were filled.
        num_dropped_tokens: Tokens left over after the last full row.
    """

    num_documents: int = 0
    num_empty_documents: int = 0
    num_bytes: int = 0
    num_text_tokens: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    num_dropped_tokens: int = 0

    @property
    def tokens_per_byte(self) -> float:
        """Tokens of text per byte of text; 1 for the byte tokenizer."""
        return self.num_text_tokens / max(self.num_bytes, 1)


class Framer:
    """Turn a text into the tokens of one document: start token, text, end token.

    The start token lets the model predict the first token of the text; it is never a target itself. A tokenizer
    without a `bos_token` starts documents with its `eos_token`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        self.start = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, framed: `[1 + text tokens + 1]`."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array([self.start, *ids, self.end], dtype=np.int32) for ids in encoded["input_ids"]]


def row_fields(input_ids: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
    """Make the fields of one row.

    Args:
        input_ids: `[L]`.
        starts: Bool `[L]`, true at the first token of each document. The first token of the row is always one.

    Returns:
        `input_ids`, `labels`, `position_ids` (int64) and `seq_idx` (int32), each `[L]`.
    """
    starts = starts.copy()
    starts[0] = True
    index = np.arange(len(input_ids))
    position_ids = index - np.maximum.accumulate(np.where(starts, index, 0))
    input_ids = input_ids.astype(np.int64)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(np.where(starts, IGNORED_LABEL, input_ids)),
        "position_ids": torch.from_numpy(position_ids),
        "seq_idx": torch.from_numpy(np.cumsum(starts, dtype=np.int32) - 1),
    }


class PackedRows(Dataset):
    """Documents packed into rows that can be read in any order; all tokens are kept in memory.

    Args:
        documents: Framed documents, as `Framer.encode` gives them.
        length: Tokens in a row.
        counts: What the documents hold; `pack_documents` fills it.
    """

    def __init__(self, documents: list[np.ndarray], length: int, counts: PackingCounts | None = None) -> None:
        _check_length(length)
        self.length = length
        self.counts = counts or PackingCounts(num_documents=len(documents))
        sizes = np.array([len(document) for document in documents], dtype=np.int64)
        self.tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int32)
        self.starts = np.zeros(len(self.tokens), dtype=bool)
        self.starts[(np.cumsum(sizes) - sizes)[sizes > 0]] = True
        self.counts.num_tokens = len(self.tokens)
        self.counts.num_rows = len(self.tokens) // length
        self.counts.num_dropped_tokens = len(self.tokens) % length

    def __len__(self) -> int:
        return self.counts.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids, starts = self.row(index)
        return row_fields(input_ids, starts)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The token ids `[L]` of a row and where documents start in it, bool `[L]`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        inside = slice(index * self.length, (index + 1) * self.length)
        return self.tokens[inside], self.starts[inside]


def pack_documents(
    documents: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int, batch_size: int = 256
) -> PackedRows:
    """Tokenize all documents (rows with a `text`) and pack them into rows of `length` tokens."""
    framer, counts, framed = Framer(tokenizer), PackingCounts(), []
    iterator = iter(documents)
    while batch := list(islice(iterator, batch_size)):
        texts = [text for row in batch if (text := row["text"])]
        counts.num_empty_documents += len(batch) - len(texts)
        framed += framer.encode(texts)
        counts.num_bytes += sum(len(text.encode()) for text in texts)
    counts.num_documents = len(framed)
    counts.num_text_tokens = sum(len(ids) - 2 for ids in framed)
    return PackedRows(framed, length, counts)


class PackedStream(IterableDataset):
    """Documents packed into rows while they are read.

    Args:
        documents: Rows with a `text`; iterated again from the start for every pass. A `datasets` stream is told the
            number of the pass through `set_epoch`, so that its shuffle changes.
        tokenizer: Any tokenizer with an `eos_token`.
        length: Tokens in a row.
        repeat: Start over when the documents end. What is left in the buffer goes into the next pass.

    `state_dict` taken after n rows and loaded into a new stream makes it go on with row n + 1. The state is the place
    in the documents and the tokens of the current ones that are not in a row yet.
    """

    def __init__(
        self,
        documents: Iterable[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        repeat: bool = False,
    ) -> None:
        _check_length(length)
        self.documents = documents
        self.framer = Framer(tokenizer)
        self.length = length
        self.repeat = repeat
        self._loaded: dict[str, Any] | None = None
        self._clear()

    def _clear(self) -> None:
        self.counts = PackingCounts()
        self._pass = 0
        self._num_read = 0  # documents read in this pass
        self._buffer = np.zeros(0, dtype=np.int32)
        self._buffer_starts = np.zeros(0, dtype=bool)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on after the last row that was yielded."""
        return {
            "pass": self._pass,
            "num_read": self._num_read,
            "buffer": self._buffer.tolist(),
            "buffer_starts": self._buffer_starts.tolist(),
            "counts": asdict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, at the next iteration, where `state` was taken."""
        self._loaded = state

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            raise ValueError("training.dataloader_num_workers must be 0 for a packed stream: its rows have one order")
        self._clear()
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self._pass, self._num_read = state["pass"], state["num_read"]
            self._buffer = np.array(state["buffer"], dtype=np.int32)
            self._buffer_starts = np.array(state["buffer_starts"], dtype=bool)
            self.counts = PackingCounts(**state["counts"])
        yield from self._full_rows()
        while True:
            read_before = self._num_read
            for row in self._documents_of_this_pass():
                self._num_read += 1
                self._append(row["text"])
                yield from self._full_rows()
            if not self.repeat or (self._num_read == read_before == 0):
                break
            self._pass, self._num_read = self._pass + 1, 0
        self.counts.num_dropped_tokens = len(self._buffer)

    def _documents_of_this_pass(self) -> Iterator[dict[str, Any]]:
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(self._pass)
        return islice(iter(self.documents), self._num_read, None)

    def _append(self, text: str | None) -> None:
        if not text:
            self.counts.num_empty_documents += 1
            return
        (ids,) = self.framer.encode([text])
        self.counts.num_documents += 1
        self.counts.num_bytes += len(text.encode())
        self.counts.num_text_tokens += len(ids) - 2
        self.counts.num_tokens += len(ids)
        self._buffer = np.concatenate([self._buffer, ids])
        self._buffer_starts = np.concatenate([self._buffer_starts, np.arange(len(ids)) == 0])

    def _full_rows(self) -> Iterator[dict[str, torch.Tensor]]:
        while len(self._buffer) >= self.length:
            row = row_fields(self._buffer[: self.length], self._buffer_starts[: self.length])
            self._buffer, self._buffer_starts = self._buffer[self.length :], self._buffer_starts[self.length :]
            self.counts.num_rows += 1
            yield row


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"data.length={length} must be at least 2: a row needs a token and one to predict from it")
