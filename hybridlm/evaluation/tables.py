"""Results as tables: what is not above chance says so, and controls stand in every row."""

from collections.abc import Iterator
from typing import Any

AT_CHANCE = "at chance"
HEADER = ("task", "length", "documents", "by likelihood", "generated", "chance", "gold")
_NONE = "–"


def score_text(estimate: dict[str, Any] | None) -> str:
    """A score with its standard error; `at chance` before it where it is not above by three of them."""
    if estimate is None:
        return _NONE
    error = "?" if estimate["error"] is None else f"{estimate['error']:.3f}"
    text = f"{estimate['score']:.3f} ± {error}"
    return text if estimate["above_chance"] else f"{AT_CHANCE} ({text})"


def rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row a cell, in the columns of `HEADER`."""
    for cell in results["cells"]:
        name = f"{cell['length']}*" if cell.get("beyond_training") else str(cell["length"])
        if cell["status"] != "scored":
            yield (cell["task"], name, _NONE, cell["status"], _NONE, _NONE, _NONE)
        elif "bits_per_byte" in cell:
            bits = cell["bits_per_byte"]
            score = f"{score_text(bits)} bits per byte"
            gold = f"{cell['gold']['bits_per_byte']:.1f}"
            yield (cell["task"], name, str(cell["num_documents"]), score, _NONE, f"{bits['chance']:.2f}", gold)
        else:
            likelihood, generated = cell["likelihood"], cell.get("generated")
            chances = [likelihood["chance"], *([generated["chance"]] if generated else [])]
            chance = " / ".join(dict.fromkeys(f"{value:.2g}" for value in chances))
            gold = f"{100 * min(cell['gold'].values()):.0f} %"
            counts = str(cell["num_documents"]) + (f" / {generated['num']}" if generated else "")
            yield (cell["task"], name, counts, score_text(likelihood), score_text(generated), chance, gold)


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    model, settings = results["model"], results["settings"]
    found = [
        f"{model['name']}, {model['parameters']:,} parameters, {model['dtype']}, hash {model['hash'][:12]}; seed "
        f"{settings['seed']}; lengths in tokens of {model['tokenizer']}; ± standard error over documents.",
        "by likelihood: every token of the answer is the most likely one; generated: greedily, under the task's "
        f"metric. '{AT_CHANCE}': not above chance by three standard errors. gold: the right answer, scored the same.",
    ]
    if any(cell.get("beyond_training") for cell in results["cells"]):
        found.append(f"*: longer than the {model['trained_length']} tokens that the model was trained for.")
    haystacks = sorted({cell["haystack"] for cell in results["cells"] if cell.get("haystack")})
    if haystacks:
        found.append(f"haystacks: {', '.join(haystacks)}.")
    return found + [f"left out: {reason}" for reason in results["skipped"]]


def markdown(results: dict[str, Any]) -> str:
    """The table for a card, with its notes."""
    lines = [f"### {results['model']['name']}, suite {results['settings']['suite']}", ""]
    lines += [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    return "\n".join([*lines, "", *notes(results), ""])
