"""Checks of `generate`: with and without a cache, padded, in beams, with drafts, in chunks, compiled."""

import math
from typing import Any

import torch
from torch import Tensor

from .base import NotApplicable, Subject, quiet


def _generate(subject: Subject, input_ids: Tensor, num_tokens: int, **options: Any) -> Any:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True} | options
    options |= {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    with torch.no_grad(), quiet():
        return subject.model.generate(input_ids, **options)


def _text_error(subject: Subject, actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """How far two greedy texts `[B, T]` differ.

    Returns:
        Where they part, the distance of the two tokens' logits in one full forward, relative to the largest logit: 0
        for a tie, which rounding may decide. `mask` `[B, T]` tells the pads of the prompt.
    """
    if torch.equal(actual, expected):
        return 0.0
    if actual.shape != expected.shape:
        return math.inf
    worst = 0.0
    for b in (actual != expected).any(1).nonzero()[:, 0].tolist():
        place = int((actual[b] != expected[b]).nonzero()[0])
        before = expected[b, :place] if mask is None else expected[b, :place][mask[b].bool().nonzero()[0, 0] :]
        logits = subject.forward(before[None])[0, -1]
        worst = max(worst, float((logits[actual[b, place]] - logits[expected[b, place]]).abs()) / subject.scale)
    return worst


def greedy_with_cache(subject: Subject, num_tokens: int = 8) -> float:
    """Greedy decoding with a cache gives the text and logits of decoding without."""
    prompt = subject.input_ids[:, :11]
    with_cache = _generate(subject, prompt, num_tokens, output_logits=True)
    without = _generate(subject, prompt, num_tokens, output_logits=True, use_cache=False)
    if not torch.equal(with_cache.sequences, without.sequences):
        return _text_error(subject, with_cache.sequences, without.sequences)
    return max(subject.error(a, b) for a, b in zip(with_cache.logits, without.logits, strict=True))


def left_padded_generation(subject: Subject, widths: tuple[int, ...] = (1, 6), num_tokens: int = 6) -> float:
    """A left-padded batch generates what each row generates alone."""
    rows = [row[: 11 - 2 * b] for b, row in enumerate(subject.input_ids)]
    alone = [_generate(subject, row[None], num_tokens, output_logits=True) for row in rows]
    worst = 0.0
    for extra in widths:
        width = max(len(row) for row in rows) + extra - 1
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=1) for row in rows])
        mask = torch.stack([torch.arange(width, device=ids.device) >= width - len(row) for row in rows]).long()
        together = _generate(subject, ids, num_tokens, attention_mask=mask, output_logits=True)
        for b, one in enumerate(alone):
            for actual, expected in zip(together.logits, one.logits, strict=True):
                worst = max(worst, subject.error(actual[b], expected[0]))
    return worst


def beams_with_cache(subject: Subject, num_tokens: int = 6) -> float:
    """Beam search with a cache gives the text of beam search without."""
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    prompt = subject.input_ids[:2, :7]
    with_cache = _generate(subject, prompt, num_tokens, **options)
    without = _generate(subject, prompt, num_tokens, use_cache=False, **options)
    # a tie may be decided either way, and then the scores are the same
    return subject.error(with_cache.sequences_scores, without.sequences_scores)


def prompt_lookup(subject: Subject, num_tokens: int = 12) -> float:
    """Prompt look-up gives the greedy text."""
    once = subject.input_ids[:1, :9]
    prompt = torch.cat([once, once, once[:, :5]], dim=1)
    greedy = _generate(subject, prompt, num_tokens)
    looked_up = _generate(subject, prompt, num_tokens, prompt_lookup_num_tokens=5)
    return _text_error(subject, looked_up.sequences, greedy.sequences)


def assisted(subject: Subject, num_tokens: int = 12, noise: float = 0.02) -> float:
    """Assisted decoding gives the greedy text, with an assistant that is often wrong and with one that never is."""
    prompt = subject.input_ids[:1, :9]
    greedy = _generate(subject, prompt, num_tokens)
    assistant = subject.copy_of_model()
    generator = torch.Generator().manual_seed(subject.seed)
    worst = 0.0
    for _ in range(2):
        drafted = _generate(subject, prompt, num_tokens, assistant_model=assistant)
        worst = max(worst, _text_error(subject, drafted.sequences, greedy.sequences))
        with torch.no_grad():
            for parameter in assistant.parameters():
                size = noise * float(parameter.abs().mean())
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return worst


def prefill_in_chunks(subject: Subject, num_tokens: int = 4) -> float:
    """`prefill_chunk_size` changes nothing."""
    prompt = subject.input_ids[:, :17]
    whole = _generate(subject, prompt, num_tokens, output_logits=True)
    chunked = _generate(subject, prompt, num_tokens, output_logits=True, prefill_chunk_size=5)
    if not torch.equal(whole.sequences, chunked.sequences):
        return _text_error(subject, chunked.sequences, whole.sequences)
    return max(subject.error(a, b) for a, b in zip(chunked.logits, whole.logits, strict=True))


def generation_goes_on(subject: Subject, num_tokens: int = 5) -> float:
    """A second `generate` with the returned cache goes on as one long generation would."""
    prompt = subject.input_ids[:, :9]
    long = _generate(subject, prompt, 2 * num_tokens)
    first = _generate(subject, prompt, num_tokens)
    cache = first.get("past_key_values")
    if subject.cache_argument != "past_key_values":
        raise NotApplicable("generate takes no past_key_values")
    if cache is None:
        raise NotApplicable("generate returns no cache")
    second = _generate(subject, first.sequences, num_tokens, past_key_values=cache)
    return _text_error(subject, second.sequences, long.sequences)


def generation_with_static_cache(subject: Subject, num_tokens: int = 6) -> float:
    """`generate` with a static cache, left-padded rows included, gives the text of the default cache."""
    prompt = subject.input_ids[:, :9].clone()
    mask = torch.ones_like(prompt)
    mask[-1, :4] = 0
    default = _generate(subject, prompt, num_tokens, attention_mask=mask)
    options = {"cache_implementation": "static", "disable_compile": True}
    static = _generate(subject, prompt, num_tokens, attention_mask=mask, **options)
    return _text_error(subject, static.sequences, default.sequences, mask)
