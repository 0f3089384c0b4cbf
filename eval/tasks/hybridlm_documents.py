"""The documents of `hybridlm eval` for lm-eval: `lm_eval --include_path eval/tasks --tasks hybridlm_babi_qa1`.

What they depend on comes through `--metadata '{"lengths": [256, 512], "samples": 32, "seed": 0}'`; lm-eval adds the
model arguments, of which `pretrained` or `tokenizer` names the tokenizer that lengths are counted in.
"""

from typing import Any

import datasets
from transformers import AutoTokenizer

from hybridlm.evaluation import make_documents, text_tasks

LENGTHS, SAMPLES = (512,), 32


def build(
    task: str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    lengths: list[int] | tuple[int, ...] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    haystack: str | None = None,
    questions: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """The documents of a task at all lengths.

    Raises:
        ValueError: No tokenizer is named, or a document does not fit a length.
    """
    source = tokenizer or pretrained
    if not isinstance(source, str):
        raise ValueError(
            "tokenizer: lengths are counted in the model's tokens; give --model_args pretrained=FOLDER, or "
            '--metadata \'{"tokenizer": "FOLDER"}\''
        )
    cutter = AutoTokenizer.from_pretrained(source)
    found = text_tasks("all", haystack=haystack, questions=questions)
    if task not in found:
        raise ValueError(f"task: {task!r} needs --metadata '{{\"questions\": FILE}}'" if task == "questions" else task)
    rows = []
    for length in lengths:
        for index, document in enumerate(make_documents(found[task], cutter, length, samples, seed=seed)):
            text = document.text
            rows.append(
                {
                    "context": text.context,
                    "answer": text.answer,
                    "length": length,
                    "index": index,
                    "chance": text.chance,
                }
            )
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether every token of the answer is the most likely one, and its likelihood."""
    log_likelihood, is_greedy = results[0]
    return {"acc": float(is_greedy), "log_likelihood": log_likelihood, "chance": doc["chance"]}
