"""Byte n-gram models with Witten-Bell interpolation: the baseline a trained model has to beat.

Reference: Witten and Bell 1991, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), in the
interpolated form of Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling".
"""

from collections.abc import Iterable

import numpy as np

NUM_BYTES = 256
NUM_SYMBOLS = NUM_BYTES + 1  # one more for "before the document", which stands in contexts only
START = NUM_BYTES


class WittenBell:
    """Predict a byte from the `order` symbols before it.

    `P(w|h) = (count(h, w) + kinds(h) P(w|h')) / (count(h) + kinds(h))`, where `kinds(h)` is the number of different
    bytes seen after `h`, and `h'` is `h` without its first symbol. Below order 0 every byte has probability 1/256.
    A context that was never seen leaves the shorter one's estimate as it is.

    Args:
        order: Symbols of context, 0 to 5.
        segments: Symbol sequences, one a document or piece of one. `START` may stand at the first place. Only bytes
            are counted as predicted, each after the symbols that stand before it in its own segment.
    """

    def __init__(self, order: int, segments: Iterable[np.ndarray]) -> None:
        if not 0 <= order <= 5:
            raise ValueError(f"order={order} must be between 0 and 5")
        self.order = order
        segments = [np.asarray(segment, dtype=np.int64) for segment in segments]
        self.tables = []
        for width in range(order + 1):
            contexts, symbols = _pairs(segments, width)
            pairs, pair_counts = np.unique(contexts * NUM_BYTES + symbols, return_counts=True)
            seen, first = np.unique(pairs // NUM_BYTES, return_index=True)
            totals = np.add.reduceat(pair_counts, first) if len(first) else np.zeros(0, dtype=np.int64)
            kinds = np.diff(first, append=len(pairs))
            self.tables.append((pairs, pair_counts, seen, totals, kinds))

    def probabilities(self, segment: np.ndarray) -> np.ndarray:
        """Probability of each byte of `segment` given what stands before it; the first may be `START`, and has none.

        A byte near the beginning has fewer symbols before it and is predicted from those.

        Returns:
            Float64 `[number of bytes]`.
        """
        segment = np.asarray(segment, dtype=np.int64)
        num_predicted = int((segment < NUM_BYTES).sum())
        result = np.full(num_predicted, 1.0 / NUM_BYTES)
        for width, table in enumerate(self.tables):
            contexts, symbols = _pairs([segment], width)
            estimate = self._interpolate(table, contexts, symbols, result[num_predicted - len(symbols) :])
            result[num_predicted - len(symbols) :] = estimate
        return result

    @staticmethod
    def _interpolate(table: tuple, contexts: np.ndarray, symbols: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        pairs, pair_counts, seen, totals, kinds = table
        count = _look_up(pairs, pair_counts, contexts * NUM_BYTES + symbols)
        total, kind = _look_up(seen, totals, contexts), _look_up(seen, kinds, contexts)
        known = total > 0
        return np.where(known, (count + kind * shorter) / np.where(known, total + kind, 1), shorter)

    def bits_per_byte(self, segments: Iterable[np.ndarray]) -> float:
        """Mean of -log2 of the probability of every byte of `segments`."""
        bits, num_bytes = 0.0, 0
        for segment in segments:
            probabilities = self.probabilities(segment)
            bits -= float(np.log2(probabilities).sum())
            num_bytes += len(probabilities)
        return bits / max(num_bytes, 1)


def _pairs(segments: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Every byte that has `width` symbols before it, and those symbols as one number; both int64 `[number]`."""
    all_contexts, all_symbols = [], []
    for segment in segments:
        symbols = segment[width:]
        contexts = np.zeros(len(symbols), dtype=np.int64)
        for place in range(width):
            contexts = contexts * NUM_SYMBOLS + segment[place : place + len(symbols)]
        is_byte = symbols < NUM_BYTES
        all_contexts.append(contexts[is_byte])
        all_symbols.append(symbols[is_byte])
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *all_contexts]), np.concatenate([empty, *all_symbols])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` where `keys` (sorted, unique) equal `wanted`, else 0."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
