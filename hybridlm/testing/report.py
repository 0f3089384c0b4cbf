"""What a run of the checks found, as a table, as JSON and as Markdown."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OK, DIFFERS, RAISES, REFUSED, NOT_APPLICABLE = "ok", "differs", "raises", "refused", "not applicable"
VERDICTS = (OK, DIFFERS, RAISES, REFUSED, NOT_APPLICABLE)
FAILURES = (DIFFERS, RAISES)
_SHORT = {OK: "ok", RAISES: "raises", REFUSED: "refused", NOT_APPLICABLE: "–"}


@dataclass
class Result:
    """One check of one model.

    Attributes:
        check: Its name.
        promise: What it holds the model to, in one line.
        compared: What was compared with what.
        verdict: One of `VERDICTS`.
        error: The largest relative error; `None` where nothing was measured.
        tolerance: The largest error that is ok.
        reason: Why it is not ok, or not applicable; one line.
        seconds: How long it took.
    """

    check: str
    promise: str
    compared: str
    verdict: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def short(self) -> str:
        """The verdict in a few characters; the error where results differ."""
        if self.verdict == DIFFERS:
            return "differs" if self.error is None or math.isinf(self.error) else f"{self.error:.0e}"
        return _SHORT[self.verdict]


@dataclass
class Report:
    """All checks of one model.

    Attributes:
        model: Its name.
        results: In the order of the suite.
        dtype: What it computed in.
        seed: Where all random choices started.
        notes: How it was prepared.
        problem: Why it could not be checked at all; empty if it could.
        device: Where it ran.
        seconds: How long all of it took.
        versions: Of the packages that matter.
    """

    model: str
    results: list[Result] = field(default_factory=list)
    dtype: str = ""
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    problem: str = ""
    device: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def ok(self) -> bool:
        """Whether the model could be checked and nothing differs or raises."""
        return not self.problem and not self.failures

    @property
    def failures(self) -> list[Result]:
        """What differs or raises."""
        return [result for result in self.results if result.verdict in FAILURES]

    def __getitem__(self, check: str) -> Result:
        return next(result for result in self.results if result.check == check)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; an infinite error is `"inf"`."""
        found = asdict(self) | {"ok": self.ok}
        for result in found["results"]:
            if result["error"] is not None and not math.isfinite(result["error"]):
                result["error"] = "inf"
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """The report that `to_dict` wrote."""
        data = {name: value for name, value in data.items() if name != "ok"}
        results = [Result(**result) for result in data.pop("results")]
        for result in results:
            result.error = math.inf if result.error == "inf" else result.error
        return cls(results=results, **data)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """A section for a model card."""
        lines = [f"### State checks of {self.model}", "", self.headline(), ""]
        if self.problem:
            return "\n".join([*lines, f"Could not be checked: {self.problem}", ""])
        lines += ["| check | promise | verdict | error | tolerance |", "|---|---|---|---|---|"]
        for result in self.results:
            verdict = f"**{result.verdict}**" if result.verdict in FAILURES else result.verdict
            reason = f": {_escape(result.reason)}" if result.reason else ""
            figures = f"{_figure(result.error)} | {_figure(result.tolerance)}"
            lines.append(f"| `{result.check}` | {_escape(result.promise)} | {verdict}{reason} | {figures} |")
        lines += ["", f"`hybridlm check`, {_versions(self.versions)}, seed {self.seed}.", ""]
        return "\n".join(lines)

    def headline(self) -> str:
        """How many checks ended how, in one line."""
        if self.problem:
            return f"{self.model}: {self.problem}"
        counts = {verdict: sum(r.verdict == verdict for r in self.results) for verdict in VERDICTS}
        ended = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{ended} in {self.dtype} on {self.device}, {self.seconds:.0f} s{notes}."

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.headline()}"]
        if not self.problem:
            width = max((len(result.check) for result in self.results), default=0)
            for r in self.results:
                figures = f"{_figure(r.error):>8} {_figure(r.tolerance):>8} {r.seconds:6.1f} s"
                lines.append(f"  {r.check:<{width}}  {r.verdict:<14} {figures}  {r.reason}".rstrip())
        return "\n".join(lines)


def summary_json(reports: Sequence[Report], command: str = "") -> str:
    """All reports, the command and the versions, as JSON."""
    found = {"command": command, "versions": versions(), "models": [report.to_dict() for report in reports]}
    return json.dumps(found, indent=2)


def summary_rows(reports: Iterable[Report]) -> list[list[str]]:
    """The cells of a table with a row for each check and a column for each model, without its heading."""
    reports = list(reports)
    names = list(dict.fromkeys(result.check for report in reports for result in report.results))
    found = [{result.check: result.short for result in report.results} for report in reports]
    return [[name, *(column.get(name, "" if not r.problem else "!") for column, r in zip(found, reports, strict=True))]
            for name in names]  # fmt: skip


def summary_markdown(reports: Sequence[Report], command: str = "") -> str:
    """One table for all models: a row for each check, a column for each model."""
    checked = [report for report in reports if not report.problem]
    lines = ["| check | " + " | ".join(report.model for report in checked) + " |", "|---" * (len(checked) + 1) + "|"]
    for name, *cells in summary_rows(checked):
        cells = [cell if cell in ("ok", "–", "refused", "") else f"**{cell}**" for cell in cells]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines.append("| seconds | " + " | ".join(f"{report.seconds:.0f}" for report in checked) + " |")
    lines += ["", *(f"- {report.model} could not be checked: {report.problem}" for report in reports if report.problem)]
    seeds = sorted({report.seed for report in reports})
    if reports:
        made = f"Made by `{command}`, " if command else ""
        lines.append(f"{made}{_versions(reports[0].versions)}, seed {', '.join(map(str, seeds))}.")
    return "\n".join(lines) + "\n"


def findings_markdown(reports: Iterable[Report]) -> str:
    """A list of all that differs, raises or was refused."""
    lines = []
    for report in reports:
        for result in report.results:
            if result.verdict in (*FAILURES, REFUSED):
                error = f", error {_figure(result.error)}" if result.error is not None else ""
                reason = f": {_escape(result.reason)}" if result.reason else ""
                lines.append(f"- {report.model} `{result.check}` {result.verdict}{error}{reason}")
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what the checks see."""
    found = {"python": platform.python_version()}
    for package in ("hybridlm", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
