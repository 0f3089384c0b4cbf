"""Write the tables of docs/state-correctness.md from what `hybridlm check` measured.

hybridlm check --native all --json native.json
hybridlm check --zoo --json zoo.json
python benchmarks/state_correctness.py native.json zoo.json
"""

import json
import sys
from pathlib import Path

from hybridlm.testing.report import FAILURES, NOT_APPLICABLE, OK, Report

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "state-correctness.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def read(path: str) -> tuple[dict, list[Report]]:
    """What one command wrote, and its reports."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    return data, [Report.from_dict(model) for model in data["models"]]


def cells(reports: list[Report], check: str) -> list[str]:
    """What each model's column says."""
    shown = []
    for report in reports:
        result = next((result for result in report.results if result.check == check), None)
        if result is None:
            shown.append("")
        else:
            shown.append(f"**{result.short}**" if result.verdict in FAILURES else result.short)
    return shown


def row(values: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(values) + " |"


def table(theirs: list[Report], ours: list[Report]) -> list[str]:
    """Checks that somebody fails or refuses, with ours in the last column; then those that nobody does."""
    names = list(dict.fromkeys(result.check for report in theirs for result in report.results))
    quiet = [n for n in names if all(r[n].verdict in (OK, NOT_APPLICABLE) for r in theirs)]
    lines = [row(["check", *(report.model for report in theirs), "hybridlm"]), "|---" * (len(theirs) + 2) + "|"]
    for name in names:
        if name not in quiet:
            mine = sorted(set(cells(ours, name)) - {"–"})
            lines.append(row([f"`{name}`", *cells(theirs, name), ", ".join(mine)]))
    passed = [n for n in quiet if any(r[n].verdict == OK for r in theirs)]
    lines += ["", "Everybody who offers it passes " + ", ".join(f"`{name}`" for name in passed) + "."]
    only = [n for n in quiet if n not in passed]
    lines += ["", "Only hybridlm offers, and passes, " + ", ".join(f"`{name}`" for name in only) + "."]
    assert all(r[n].verdict in (OK, NOT_APPLICABLE) for r in ours for n in quiet)
    return lines


def our_table(ours: list[Report]) -> list[str]:
    """How many checks of each kind every preset has."""
    lines = [row(["preset", "ok", "not applicable", "differs or raises", "largest error"]), "|---" * 5 + "|"]
    for report in ours:
        verdicts = [result.verdict for result in report.results]
        errors = [r.error for r in report.results if r.tolerance and r.tolerance < 1e-7 and r.error is not None]
        counts = [verdicts.count(OK), verdicts.count(NOT_APPLICABLE), len(report.failures)]
        lines.append(row([report.model, *map(str, counts), f"{max(errors):.0e}"]))
    return lines


def main() -> None:
    """Replace what lies between the marks."""
    (native, theirs), (zoo, ours) = map(read, sys.argv[1:3])
    broken = [report for report in theirs if report.problem]
    theirs = [report for report in theirs if not report.problem]
    versions = ", ".join(f"{name} {version}" for name, version in native["versions"].items())
    lines = [
        f"`{native['command']}` and `{zoo['command']}`; {versions}; seed {theirs[0].seed}; on a CPU, without kernel "
        "packages. A number is the largest error relative to the largest logit or gradient.",
        "",
        *table(theirs, ours),
        "",
        *(f"{report.model} could not be built: {report.problem}" for report in broken),
        *our_table(ours),
    ]
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
