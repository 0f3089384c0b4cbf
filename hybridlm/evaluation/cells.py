"""Score one cell: the documents of a task at a length, with the gold answer through the same scorer beside them."""

from typing import TYPE_CHECKING, Any

from .chance import estimate
from .documents import TextTask, make_documents
from .haystack import HAYSTACKS, haystack_hash
from .length import bits_by_length, long_texts
from .loading import Evaluated
from .scoring import Likelihood, decode, generate_answers, gold_logits, judge, model_logits, score_rows
from .symbols import token_rows

if TYPE_CHECKING:
    from .runner import Settings


class ControlFailed(AssertionError):
    """The scorer does not give the gold answer all points, so its scores mean nothing."""


def score_text(found: Evaluated, task: TextTask, length: int, settings: "Settings") -> dict[str, Any]:
    """Likelihood and generation of a task's documents.

    Raises:
        DoesNotFit: The task needs more tokens.
    """
    documents = make_documents(task, found.tokenizer, length, settings.samples, seed=settings.seed)
    rows = [(document.ids, document.labels) for document in documents]
    size, batch_tokens = found.vocab_size, settings.batch_tokens
    scores = score_rows(model_logits(found.model), rows, size, batch_tokens)
    gold = score_rows(gold_logits(size), rows[: settings.generated or 8], size, batch_tokens)
    exact = [float(score.exact) for score in scores]
    sizes = [document.num_tokens for document in documents]
    result = {
        "source": task.source,
        "haystack": task.haystack,
        "haystack_hash": haystack_hash(task.haystack) if task.haystack in HAYSTACKS else None,
        "beyond_training": bool(found.trained_length and length > found.trained_length),
        "num_documents": len(documents),
        "tokens": {"mean": round(sum(sizes) / len(sizes), 3), "least": min(sizes), "most": max(sizes)},
        "depths": list(task.depths),
        "likelihood": estimate(exact, [document.text.chance for document in documents]).to_dict(),
        "log_likelihood": _mean_likelihood(scores),
        "token_accuracy": round(sum(s.num_right for s in scores) / sum(s.num_tokens for s in scores), 6),
        "gold": {"likelihood": sum(score.exact for score in gold) / len(gold)},
        "documents": [[int(score.exact), round(score.log_likelihood, 5)] for score in scores],
    }
    if task.depths:
        result["by_depth"] = _by_depth([document.text.depths[0] for document in documents], exact)
    if settings.generated:
        chosen = documents[: settings.generated]
        answers = generate_answers(found.model, found.tokenizer, chosen, batch_tokens)
        judged = [judge(document.text, answer) for document, answer in zip(chosen, answers, strict=True)]
        chances = [document.text.generated_chance or 0.0 for document in chosen]
        golds = [judge(document.text, decode(found.tokenizer, document.answer_ids)) for document in chosen]
        result["generated"] = estimate(judged, chances).to_dict() | {"metric": chosen[0].text.metric}
        starts = [answer.strip().startswith(d.text.answer.strip()) for d, answer in zip(chosen, answers, strict=True)]
        result["generated"]["agrees"] = sum(
            was == bool(right) for was, right in zip(starts, exact, strict=False)
        ) / len(chosen)
        result["gold"]["generated"] = sum(golds) / len(golds)
    _check_gold(task.name, result["gold"])
    return result


def score_own(found: Evaluated, own: dict[str, Any], length: int, settings: "Settings") -> dict[str, Any]:
    """Rows of the task that the model was trained on, drawn anew: the share of right answers in each."""
    made = token_rows(own["task"], settings.samples, length, seed=settings.seed, **own["options"])
    largest = max(int(made.input_ids.max()), int(made.labels.max()))
    if largest >= found.vocab_size:
        raise ValueError(f"task: {own['task']} has symbol {largest}, the model's vocabulary {found.vocab_size} tokens")
    rows = list(zip(made.input_ids.tolist(), made.labels.tolist(), strict=True))
    scores = score_rows(model_logits(found.model), rows, found.vocab_size, settings.batch_tokens)
    gold = score_rows(gold_logits(found.vocab_size), rows[:8], found.vocab_size, settings.batch_tokens)
    shares = [score.num_right / score.num_tokens for score in scores]
    result = {
        "source": "task.json of the model",
        "options": own["options"],
        "trained_on_length": own["length"],
        "beyond_training": length > own["length"],
        "num_documents": len(rows),
        "num_answers": sum(score.num_tokens for score in scores),
        "likelihood": estimate(shares, [made.chance] * len(shares)).to_dict(),
        "log_likelihood": _mean_likelihood(scores),
        "gold": {"likelihood": sum(score.exact for score in gold) / len(gold)},
        "documents": [[round(share, 6), round(s.log_likelihood, 5)] for share, s in zip(shares, scores, strict=True)],
    }
    _check_gold(own["task"], result["gold"])
    return result


def score_bits(
    found: Evaluated, texts: tuple[list[str], str], length: int, longest: int, settings: "Settings"
) -> dict[str, Any]:
    """Bits per byte in windows of `length`, over texts of `longest` tokens.

    Raises:
        DoesNotFit: No text is that long.
    """
    num = max(2, min(settings.samples, 6))
    chosen = long_texts(texts[0], found.tokenizer, longest, num, texts[1])
    size = found.vocab_size
    result = bits_by_length(model_logits(found.model), chosen, length, size, settings.batch_tokens)
    gold = bits_by_length(gold_logits(size), chosen, length, size, settings.batch_tokens)["bits_per_byte"]["score"]
    if gold != 0:
        raise ControlFailed(f"bits_per_byte: the right tokens score {gold:.3f} bits, not 0")
    return {
        "source": chosen.source,
        "text_hash": chosen.digest,
        "beyond_training": bool(found.trained_length and length > found.trained_length),
        "num_documents": len(chosen.ids),
        "tokens": {"a_document": longest},
        "gold": {"bits_per_byte": gold},
        **result,
    }


def _mean_likelihood(scores: list[Likelihood]) -> dict[str, float | None]:
    found = estimate([score.log_likelihood for score in scores], [0.0])
    return {"mean": round(found.score, 5), "error": None if found.error is None else round(found.error, 5)}


def _by_depth(depths: list[float], scores: list[float]) -> list[dict[str, float]]:
    groups: dict[float, list[float]] = {}
    for depth, score in zip(depths, scores, strict=True):
        groups.setdefault(depth, []).append(score)
    return [
        {"depth": depth, "score": round(sum(values) / len(values), 6), "num": len(values)}
        for depth, values in sorted(groups.items())
    ]


def _check_gold(task: str, gold: dict[str, float]) -> None:
    for way, score in gold.items():
        if score != 1:
            raise ControlFailed(f"{task}: the gold answer scores {score:.3f} by {way}, not 1")
