"""A run's results in a few lines of text."""

from typing import Any


def summarize(results: dict[str, Any]) -> str:
    """Say what a run measured, in the order a reader asks for it."""
    data, training = results["data"], results["training"]
    active = _active(results)
    lines = [
        f"{results['name']}: {results['parameters']:,} parameters{active}, {_count(training['steps'], 'step')}, "
        f"{results['tokens_seen']:,} tokens in {training['seconds']:.0f} s",
        f"data {data['path']}: {_count(data['num_documents'], 'document')}, {data['num_bytes']:,} bytes, "
        f"manifest {data['manifest_hash']}",
    ]
    for score in results.get("heldout", []):
        lines.append(
            f"held-out bits per byte at {score['length']} tokens: {score['bits_per_byte']:.4f} "
            f"({score['num_bytes']:,} bytes of {_count(score['num_documents'], 'document')})"
        )
    for rule, score in results.get("heldout_by_rule", {}).items():
        lines.append(f"the same at {score['length']} tokens, rule {rule}: {score['bits_per_byte']:.4f}")
    for ngram in results.get("ngrams", []):
        lines.append(f"order-{ngram['order']} byte model on what training saw: {ngram['bits_per_byte']:.4f}")
    lines.append(f"saved in {results['folder']}")
    reload = results.get("reload")
    if reload:
        equal = "equal bit for bit" if reload["logits_equal"] else f"differ by up to {reload['max_difference']:.3g}"
        lines.append(f"loaded again in a new process as {reload['class'].rpartition('.')[2]}: logits {equal}")
        if "continuation" in reload:
            lines += ["", reload["continuation"], ""]
    lines.append(f"{results['seconds']:.0f} s in all")
    lines += [f"FAILED: {failure}" for failure in results["failures"]]
    return "\n".join(lines)


def _active(results: dict[str, Any]) -> str:
    active, expected = results["active_parameters"], results.get("expected_active_parameters")
    if not active:
        return ""
    if not expected or expected == active:
        return f" ({active:,} active)"
    return f" (active at most {active:,}, expected {expected:,})"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
