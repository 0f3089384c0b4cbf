"""Bits per byte against the position in a window, and against the length of the windows.

The same text is read at every length: cut into windows of that length, each from an empty state and with the token
before it, so that lengths differ only in how much the model sees.

Shapes: D documents, T tokens of a document, B rows, L tokens of a window.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridlm.data.documents import is_heldout, load_documents, stdlib_files, text_hash
from hybridlm.data.packing import Framer

from .chance import NUM_ERRORS, estimate
from .documents import DoesNotFit
from .scoring import MOST_LOGITS, LogitsOf

HELDOUT_MODULUS = 20  # as run files hold out by default
FACTORS = (1, 2, 4, 8, 16, 32)
_FIRST_BUCKET = 16


@dataclass(frozen=True)
class LongTexts:
    """Documents of equal length in tokens.

    Attributes:
        ids: `[D, T + 1]`, each with the token before its first.
        num_bytes: `[D, T]`, bytes that each token stands for.
        source: Where they come from.
        digest: SHA-256 over them.
    """

    ids: np.ndarray
    num_bytes: np.ndarray
    source: str
    digest: str


def read_texts(path: str | Path | None) -> tuple[list[str], str]:
    """Texts and their source: the held-out files of Python's standard library, or all documents of a path."""
    if path is not None:
        documents = load_documents(str(path), heldout_modulus=0)
        return [text for text in documents.train["text"] if text], Path(path).name
    texts = []
    for file in stdlib_files():
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text and is_heldout(text, HELDOUT_MODULUS):
            texts.append(text)
    return sorted(texts, key=text_hash), "standard library, held-out files"


def long_texts(texts: Sequence[str], tokenizer: Any, num_tokens: int, num: int, source: str = "texts") -> LongTexts:
    """The first `num` texts that have `num_tokens` tokens, cut to them.

    Raises:
        DoesNotFit: No text is that long.
    """
    ids, sizes, digest = [], [], hashlib.sha256()
    for text in texts:
        if len(ids) == num:
            break
        if len(text.encode()) < num_tokens:
            continue
        (framed,) = Framer(tokenizer).encode([text])
        if len(framed) - 2 < num_tokens:
            continue
        ids.append(framed[: num_tokens + 1])
        sizes.append(_bytes_of(tokenizer, text, len(framed) - 2)[:num_tokens])
        digest.update(text.encode())
    if not ids:
        raise DoesNotFit(f"bits_per_byte: no text of {source} has {num_tokens} tokens")
    return LongTexts(np.stack(ids), np.stack(sizes), source, digest.hexdigest())


def _bytes_of(tokenizer: Any, text: str, num_tokens: int) -> np.ndarray:
    """`[T]`, bytes of each token; the first token of a character that takes several has them all."""
    if not getattr(tokenizer, "is_fast", False):
        return np.full(num_tokens, len(text.encode()) / num_tokens)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = np.array([end for _, end in encoded["offset_mapping"]])
    up_to = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    return np.diff(np.maximum.accumulate(up_to[ends]), prepend=0).astype(float)


@torch.inference_mode()
def window_nats(
    logits_of: LogitsOf, texts: LongTexts, length: int, vocab_size: int, batch_tokens: int = 8192
) -> np.ndarray:
    """`[D, T]`, -ln p of each token, read in windows of `length`."""
    nats = np.zeros(texts.num_bytes.shape)
    windows = [(row, start) for row in range(len(nats)) for start in range(0, nats.shape[1], length)]
    # full windows go before the last ones of the texts, which may be shorter
    windows.sort(key=lambda window: min(nats.shape[1] - window[1], length), reverse=True)
    count = max(1, min(batch_tokens, MOST_LOGITS // vocab_size) // length)
    while windows:
        size = min(nats.shape[1] - windows[0][1], length)
        chunk = [window for window in windows[:count] if min(nats.shape[1] - window[1], length) == size]
        windows = windows[len(chunk) :]
        rows = np.stack([texts.ids[row, start : start + size + 1] for row, start in chunk]).astype(np.int64)
        ids = torch.from_numpy(rows)  # [B, L + 1]
        logits = logits_of(ids[:, :-1], ids[:, 1:])
        if logits.shape[1] != size:
            raise ValueError(f"model: gave {logits.shape[1]} logits for {size} tokens")
        wanted = ids[:, 1:].to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")
        for (row, start), values in zip(chunk, losses.cpu().numpy(), strict=True):
            nats[row, start : start + size] = values
    return nats


def bits_by_length(
    logits_of: LogitsOf, texts: LongTexts, length: int, vocab_size: int, batch_tokens: int = 8192
) -> dict[str, Any]:
    """Bits per byte with windows of `length`: the mean over documents, and by position in the window."""
    nats = window_nats(logits_of, texts, length, vocab_size, batch_tokens)
    by_document = (nats.sum(1) / math.log(2) / texts.num_bytes.sum(1)).tolist()
    uniform = math.log2(vocab_size) * nats.shape[1] / texts.num_bytes.sum(1)
    found = estimate(by_document, uniform.tolist())
    # fewer bits are better; rounding is no merit
    above = found.error is not None and found.score < found.chance - NUM_ERRORS * found.error - 1e-6
    position = np.arange(nats.shape[1]) % length
    buckets, start, stop = [], 0, min(_FIRST_BUCKET, length)
    while start < length:
        inside = (position >= start) & (position < stop)
        bits = nats[:, inside].sum() / math.log(2) / max(texts.num_bytes[:, inside].sum(), 1)
        buckets.append({"start": start, "stop": stop, "bits_per_byte": round(float(bits), 6)})
        start, stop = stop, min(2 * stop, length)
    return {
        "bits_per_byte": found.to_dict() | {"above_chance": above},
        "by_position": buckets,
        "documents": [round(bits, 6) for bits in by_document],
        "num_bytes": int(texts.num_bytes.sum()),
    }
