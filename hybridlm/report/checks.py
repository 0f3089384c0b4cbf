"""What `hybridlm check` found: a verdict for each promise and model."""

from collections.abc import Sequence

from .blocks import NONE, Block, Cell, Section, Table, distinct
from .node import Node
from .sources import Source

_BAD = ("differs", "raises")


def sections(sources: Sequence[Source]) -> list[Section]:
    """One section for all check reports."""
    reports = [(source.number, model) for source in sources for model in _models(source.data)]
    if not reports:
        return []
    names = [model["model"].text() for _, model in reports]
    names = distinct(names, [(model.optional_text("dtype") or NONE, f"file {number}") for number, model in reports])
    blocks: list[Block] = [_verdicts(reports, names)]
    findings = _findings(reports, names)
    return [Section("checks", "State checks", [*blocks, *([findings] if findings is not None else [])])]


def _models(data: Node) -> list[Node]:
    return data.each("models") or [data]


def _verdicts(reports: Sequence[tuple[int, Node]], names: Sequence[str]) -> Table:
    found = [{result["check"].text(): result for result in model["results"]} for _, model in reports]
    promises = {name: result.optional_text("promise") or "" for results in found for name, result in results.items()}
    rows = []
    for check, promise in promises.items():
        rows.append([Cell(check), Cell(promise), *(_verdict(results.get(check)) for results in found)])
    note = "differs: more than the tolerance. refused: by the model, with a reason. –: does not apply or did not run."
    sources = sorted({number for number, _ in reports})
    return Table("Verdicts", ["check", "promise", *names], rows, sources, note)


def _verdict(result: Node | None) -> Cell:
    if result is None:
        return Cell(NONE, dim=True)
    verdict = result["verdict"].text()
    if verdict == "not applicable":
        return Cell(NONE, dim=True)
    error = result.get("error")
    if verdict in _BAD and error is not None:
        return Cell(f"{verdict} ({_error(error)})")
    return Cell(verdict)


def _error(node: Node) -> str:
    return "infinite" if node.value == "inf" else f"{node.number():.1e}"


def _findings(reports: Sequence[tuple[int, Node]], names: Sequence[str]) -> Table | None:
    rows = []
    for (_, model), name in zip(reports, names, strict=True):
        problem = model.optional_text("problem")
        if problem:
            rows.append([Cell(name), Cell(NONE), Cell("could not be checked"), Cell(NONE), Cell(problem)])
        for result in model["results"]:
            verdict = result["verdict"].text()
            if verdict in (*_BAD, "refused"):
                error = result.get("error")
                shown = Cell(NONE) if error is None else Cell(_error(error))
                reason = result.optional_text("reason") or ""
                rows.append([Cell(name), Cell(result["check"].text()), Cell(verdict), shown, Cell(reason)])
    if not rows:
        return None
    titles = ["model", "check", "verdict", "relative error", "reason"]
    return Table("What is not ok", titles, rows, sorted({number for number, _ in reports}))
