"""Scores of documents: by the likelihood of the answer, and by what the model generates.

By likelihood an answer is right when each of its tokens is the most likely one after the true tokens before it; then
greedy generation gives the same answer, if the cache is right. Both ways also judge the gold answer, as a control.

Shapes: B rows, T tokens, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from hybridlm.data.recall import NO_LABEL

from .documents import TextDocument, TokenDocument
from .loading import takes

MOST_LOGITS = 2**27  # elements of logits at a time: half a GiB

Row = tuple[Sequence[int], Sequence[int]]  # input_ids and labels [T]
LogitsOf = Callable[[Tensor, Tensor], Tensor]  # input_ids and the tokens that come next [B, T] to logits [B, T, V]


@dataclass(frozen=True)
class Likelihood:
    """How likely a row's answers are.

    Attributes:
        log_likelihood: Sum of ln p over the answers' tokens.
        num_right: Tokens that are the most likely one.
        num_tokens: Tokens of answers.
    """

    log_likelihood: float
    num_right: int
    num_tokens: int

    @property
    def exact(self) -> bool:
        """Whether all tokens are right."""
        return self.num_right == self.num_tokens


def model_logits(model: PreTrainedModel) -> LogitsOf:
    """What the model predicts. Pads come last in a row, where nothing looks at them, so that no mask is needed."""

    def logits_of(input_ids: Tensor, wanted: Tensor) -> Tensor:
        options = {"use_cache": False} if takes(model, "use_cache") else {}
        return model(input_ids=input_ids.to(model.device), **options).logits

    return logits_of


def gold_logits(vocab_size: int) -> LogitsOf:
    """What a model that knows the answers would predict."""

    def logits_of(input_ids: Tensor, wanted: Tensor) -> Tensor:
        logits = torch.full((*input_ids.shape, vocab_size), -100.0)
        return logits.scatter(2, wanted[..., None], 0.0)

    return logits_of


@torch.inference_mode()
def score_rows(logits_of: LogitsOf, rows: Sequence[Row], vocab_size: int, batch_tokens: int = 8192) -> list[Likelihood]:
    """The likelihood of the answers of each row.

    Args:
        logits_of: The model, or a control.
        rows: Tokens and labels, the labels at their own places.
        vocab_size: V, which bounds how many rows go together.
        batch_tokens: Tokens that go together.
    """
    found: list[Likelihood | None] = [None] * len(rows)
    most = min(batch_tokens, MOST_LOGITS // vocab_size)
    for indices in _batches([len(ids) for ids, _ in rows], most):
        longest = max(len(rows[index][0]) for index in indices)
        input_ids = torch.zeros(len(indices), longest, dtype=torch.long)
        labels = torch.full_like(input_ids, NO_LABEL)
        for number, index in enumerate(indices):
            ids, wanted = rows[index]
            input_ids[number, : len(ids)] = torch.as_tensor(ids)
            labels[number, : len(wanted)] = torch.as_tensor(wanted)
        assert bool((labels[:, 0] == NO_LABEL).all()), "the first token of a row is predicted from nothing"
        logits = logits_of(input_ids, torch.where(labels == NO_LABEL, input_ids, labels).roll(-1, dims=1))
        for number, index in enumerate(indices):
            places = (labels[number] != NO_LABEL).nonzero()[:, 0]
            wanted = labels[number, places].to(logits.device)
            scores = logits[number, places.to(logits.device) - 1].float().log_softmax(-1)  # [answers, V]
            chosen = scores.gather(1, wanted[:, None]).sum().item()
            right = int((scores.argmax(-1) == wanted).sum())
            found[index] = Likelihood(chosen, right, len(places))
    return [score for score in found if score is not None]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of about one length that go together, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def may_pad(model: PreTrainedModel) -> bool:
    """Whether left padding surely changes nothing: in our models, and in those whose only state is keys and values."""
    return hasattr(model, "new_cache") or not getattr(model, "_is_stateful", False)


class _Diverged(StoppingCriteria):
    """Stop a row whose text can no longer begin with its answer, where nothing else is judged.

    Args:
        tokenizer: Turns tokens into text.
        documents: Of the rows.
        start: Where the generated tokens begin.
    """

    def __init__(self, tokenizer: Any, documents: Sequence[TokenDocument], start: int) -> None:
        self.tokenizer, self.documents, self.start = tokenizer, documents, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        done = []
        for row, document in zip(input_ids[:, self.start :].tolist(), self.documents, strict=True):
            # the last character may still lack bytes
            text, answer = decode(self.tokenizer, row).rstrip("\ufffd").strip(), document.text.answer.strip()
            done.append(document.text.metric == "starts" and not answer.startswith(text))
        return torch.tensor(done, device=input_ids.device)


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel, tokenizer: Any, documents: Sequence[TokenDocument], batch_tokens: int = 8192
) -> list[str]:
    """What the model goes on with, greedily, after each context; no further than its judgement needs.

    Rows that go together are padded on the left; where padding may change something they have one length.
    """
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ends = tokenizer.eos_token_id
    answers = [""] * len(documents)
    for indices in _groups(documents, batch_tokens, together=may_pad(model)):
        longest = max(len(documents[index].context_ids) for index in indices)
        input_ids = torch.full((len(indices), longest), pad)
        mask = torch.zeros_like(input_ids)
        for number, index in enumerate(indices):
            ids = torch.tensor(documents[index].context_ids)
            input_ids[number, longest - len(ids) :] = ids
            mask[number, longest - len(ids) :] = 1
        config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max(documents[index].num_new for index in indices),
            pad_token_id=pad, eos_token_id=ends, repetition_penalty=1.0, no_repeat_ngram_size=0,
        )  # fmt: skip
        device = model.device
        stop = _Diverged(tokenizer, [documents[index] for index in indices], longest)
        output = model.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        for number, index in enumerate(indices):
            new = output[number, longest:][: documents[index].num_new].tolist()
            if ends is not None and ends in new:
                new = new[: new.index(ends)]
            answers[index] = decode(tokenizer, new)
    return answers


def _groups(documents: Sequence[TokenDocument], batch_tokens: int, *, together: bool) -> Iterator[list[int]]:
    lengths = [len(document.context_ids) for document in documents]
    if together:
        yield from _batches(lengths, batch_tokens)
        return
    for length in sorted(set(lengths)):
        indices = [index for index, other in enumerate(lengths) if other == length]
        for chunk in _batches([length] * len(indices), batch_tokens):
            yield [indices[number] for number in chunk]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of tokens as it stands."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def judge(document: TextDocument, generated: str) -> float:
    """The score of a generated text, from 0 to 1, under the document's metric."""
    if document.metric == "starts":
        return float(generated.strip().startswith(document.answer.strip()))
    if document.metric == "first_sentence":
        return float(_told(document, generated) == document.answer.strip().split(", "))
    found = [reference.strip().lower() in generated.lower() for reference in document.references]
    return float(any(found)) if document.metric == "any" else sum(found) / len(found)


def _told(document: TextDocument, generated: str) -> list[str]:
    """The candidates that the first sentence names, each once, in their order."""
    first = re.split(r"[.\n]", generated.strip(), maxsplit=1)[0].lower()
    known = {word for candidate in document.candidates for word in candidate.split(", ")}
    by_lower = {word.lower(): word for word in known}
    words = re.findall(r"\w+", first)
    return list(dict.fromkeys(by_lower[word] for word in words if word in by_lower))
