"""What the causal rule of a mixture of depths costs, against the top k that training may use.

The top k of a document lets later tokens decide whether an earlier one enters: in evaluation that is a leak. It is
measured here and nowhere else, and whatever it touches is labelled so.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from ..training.bits_per_byte import HeldoutScore

CAUSAL, LEAK = "causal", "top_k (leak)"


def check_top_k(model: nn.Module, where: str = "model") -> list[nn.Module]:
    """The mixture-of-depths spans inside a model, in order.

    Raises:
        ValueError: There is none; the message starts with `where`.
    """
    spans = [module for module in model.modules() if hasattr(module, "top_k_in_evaluation")]  # remote code too
    if not spans:
        raise ValueError(f"{where}: the model has no mixture_of_depths span, so there is no top k to compare with")
    return spans


@contextmanager
def leaky_top_k(model: nn.Module) -> Iterator[None]:
    """Choose by the top k of every document in evaluation too. A leak: later tokens decide about earlier ones.

    What a model predicts inside is no prediction and its loss is too low; use it to compare with the causal rule only.
    A forward with a cache stays causal, so `generate` is not touched. Training is not changed.

    Args:
        model: Any model with mixture-of-depths spans inside.

    Raises:
        ValueError: There is no such span.
    """
    spans = check_top_k(model)
    before = [span.top_k_in_evaluation for span in spans]
    for span in spans:
        span.top_k_in_evaluation = True
    try:
        yield
    finally:
        for span, value in zip(spans, before, strict=True):
            span.top_k_in_evaluation = value


def bits_per_byte_by_rule(
    model: PreTrainedModel,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    batch_tokens: int = 8192,
) -> dict[str, "HeldoutScore"]:
    """Measure the same text under the causal rule and under the top k, which is a leak.

    Args:
        model: As in `evaluate_bits_per_byte`, like the other arguments; with a mixture-of-depths span.
        texts: Documents.
        tokenizer: The model's tokenizer.
        length: Tokens a window may hold; the top k is that of a window.
        batch_tokens: Tokens in one forward pass.

    Returns:
        `{"causal": score, "top_k (leak)": score}`.

    Raises:
        ValueError: There is no such span, or as `evaluate_bits_per_byte`.
    """
    from ..training.bits_per_byte import evaluate_bits_per_byte  # training measures by this file

    texts = list(texts)
    with leaky_top_k(model):
        leak = evaluate_bits_per_byte(model, texts, tokenizer, length, batch_tokens)
    return {CAUSAL: evaluate_bits_per_byte(model, texts, tokenizer, length, batch_tokens), LEAK: leak}
