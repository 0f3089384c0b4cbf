"""Held-out bits per byte: a measure that does not depend on the tokenizer."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlm.data import Framer


@dataclass(frozen=True)
class HeldoutScore:
    """Bits per byte of some documents, read in windows of `length` tokens."""

    length: int
    bits_per_byte: float
    num_bytes: int
    num_tokens: int
    num_documents: int


def evaluate_bits_per_byte(
    model: PreTrainedModel,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    batch_tokens: int = 8192,
) -> HeldoutScore:
    """Measure how many bits the model needs per byte of text.

    Each document is read alone, from its start token, in windows of `length` tokens. A window starts from an empty
    state and with the last token before it, so every token of the text is predicted exactly once, whatever the
    length: scores at different lengths are about the same bytes. The end token is not scored.

    Args:
        model: A causal language model; its mode is left as it was.
        texts: Documents; empty ones are left out.
        tokenizer: The model's tokenizer.
        length: Tokens a window may hold.
        batch_tokens: Tokens in one forward pass (at least one window).

    Raises:
        ValueError: There is no text, or `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"evaluation.lengths: {length} must be at least 1")
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("evaluation: there is no held-out text to score")
    documents = [ids[:-1] for ids in Framer(tokenizer).encode(texts)]
    was_training = model.training
    model.eval()
    nats = 0.0
    with torch.inference_mode():
        for inputs, targets in _batches(documents, length, batch_tokens):
            nats += _total_nats(model, inputs.to(model.device), targets.to(model.device))
    model.train(was_training)
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(document) - 1 for document in documents)
    return HeldoutScore(length, nats / math.log(2) / num_bytes, num_bytes, num_tokens, len(texts))


def _total_nats(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -ln of the probability of `targets` `[B, L]`, given `inputs` `[B, L]`; -100 marks pads at the end."""
    # no mask where there are no pads: masks may send attention down a slower path
    mask = None if (targets >= 0).all() else (targets >= 0).long()
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return loss.item()


def _batches(
    documents: list[np.ndarray], length: int, batch_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut documents into windows and group windows of about one size; yields inputs and targets `[B, L]`."""
    windows = [
        document[first : first + length + 1] for document in documents for first in range(0, len(document) - 1, length)
    ]
    windows.sort(key=len, reverse=True)
    batch_size = max(1, batch_tokens // length)
    # full windows apart from partial ones, so that they need no pads
    for _, group in groupby(windows, key=lambda window: len(window) == length + 1):
        same_kind = list(group)
        for first in range(0, len(same_kind), batch_size):
            yield _pad(same_kind[first : first + batch_size])


def _pad(windows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(window) for window in windows) - 1
    inputs = torch.zeros(len(windows), longest, dtype=torch.long)
    targets = torch.full((len(windows), longest), -100)
    for row, window in enumerate(windows):
        ids = torch.from_numpy(window.astype(np.int64))
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:]
    return inputs, targets
