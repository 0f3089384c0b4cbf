"""Long-context and recall tasks made offline, and their scores by likelihood and by generation."""

from .chance import Estimate, estimate
from .documents import DoesNotFit, TextDocument, TextTask, TokenDocument, batch, make_document, make_documents
from .haystack import HAYSTACKS
from .loading import Evaluated, load
from .runner import Settings, evaluate
from .scoring import generate_answers, judge, model_logits, score_rows
from .suites import SUITES, text_tasks
from .symbols import TOKEN_TASKS, text_of, token_rows
from .tables import markdown

__all__ = [
    "HAYSTACKS",
    "SUITES",
    "TOKEN_TASKS",
    "DoesNotFit",
    "Estimate",
    "Evaluated",
    "Settings",
    "TextDocument",
    "TextTask",
    "TokenDocument",
    "batch",
    "estimate",
    "evaluate",
    "generate_answers",
    "judge",
    "load",
    "make_document",
    "make_documents",
    "markdown",
    "model_logits",
    "score_rows",
    "text_of",
    "text_tasks",
    "token_rows",
]
