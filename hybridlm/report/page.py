"""Put a report together: one page that needs nothing else, and pictures beside it."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import hybridlm
from hybridlm.evaluation.runner import writable_folder

from . import checks, comparisons, curves, evals, races, svg, trainings
from .blocks import NONE, Cell, Grid, Section, Table, Words, count
from .charts import Chart, HeatMap, LineChart
from .evals import Scored
from .sources import Source, read_sources

PAGE = "report.html"
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Report:
    """A report before it is written.

    Attributes:
        sections: In the order of the page.
        sources: The files that it is made of.
        ignored: JSON files that hold no results.
    """

    sections: list[Section]
    sources: list[Source]
    ignored: list[str]

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        found: list[Chart] = []
        for section in self.sections:
            for block in section.blocks:
                found += block.charts if isinstance(block, Grid) else []
                found += [block] if isinstance(block, LineChart | HeatMap) else []
        return found


def make_report(runs: Sequence[str | Path]) -> Report:
    """Read results and arrange them.

    Args:
        runs: Folders and files: results of `hybridlm eval`, races, training runs, check reports.

    Raises:
        ValueError: A file is broken; with its name, the place and the reason.
        OSError: There is nothing to read.
    """
    sources, ignored = read_sources(runs)
    of_kind: dict[str, list[Source]] = {}
    for source in sources:
        of_kind.setdefault(source.kind, []).append(source)
    scored = evals.gather(of_kind.get("eval", []))
    sections = [
        *([Section("models", "Models", [_models(scored)])] if scored else []),
        *evals.sections(scored),
        *curves.sections(scored),
        *races.sections(of_kind.get("race", [])),
        *trainings.sections(trainings.gather(of_kind.get("training", []))),
        *comparisons.sections(of_kind.get("isoflop", []) + of_kind.get("memory", [])),
        *checks.sections(of_kind.get("check", [])),
        Section("sources", "Sources", [_sources_words(), _sources_table(sources)]),
    ]
    return Report(sections, sources, ignored)


def _models(scored: Sequence[Scored]) -> Table:
    rows = []
    for run in scored:
        model = run.model
        rows.append(
            [
                Cell(run.name),
                count(model["parameters"].number()),
                count(model.optional_number("trained_length")),
                Cell(model.optional_text("tokenizer") or NONE),
                Cell(model.optional_text("dtype") or NONE),
                Cell(model.optional_text("device") or NONE),
                Cell(model["hash"].text()[:12]),
            ]
        )
    titles = ["model", "parameters", "trained length", "tokenizer", "number format", "device", "hash of the weights"]
    return Table("Models that were scored", titles, rows, evals.numbers_of(scored))


def _sources_words() -> Words:
    return Words(
        ["Every figure of this page stands in one of these files, or is a mean of figures that do. Numbers in brackets "
         "refer to them. The hash is SHA-256 of the file. Copies count once."]
    )  # fmt: skip


def _sources_table(sources: Sequence[Source]) -> Table:
    rows = []
    for source in sources:
        versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
        digests = source.digest
        if source.records_digest and source.records_digest != source.digest:
            digests += f"; its metrics.jsonl {source.records_digest}"
        digests += "".join(f"; {name} {digest}" for name, digest in source.copies if digest != source.digest)
        name = source.name
        if source.copies:
            name += (
                f"; {'copy' if len(source.copies) == 1 else 'copies'}: {', '.join(copy for copy, _ in source.copies)}"
            )
        number = Cell(f"[{source.number}]", source.number)
        rows.append([number, Cell(name), Cell(source.kind), Cell(source.date), Cell(versions or NONE), Cell(digests)])
    return Table("Files", ["number", "file", "kind", "date", "versions", "SHA-256"], rows)


# -- the page ------------------------------------------------------------------------------------------------------


def render(report: Report, title: str = "", pictures: bool = False) -> str:
    """The page as HTML.

    Args:
        report: What it shows.
        title: Its heading; by default what is in it.
        pictures: Whether there is a picture of every chart beside the page.
    """
    folder = files(__package__)
    style, script, template = (
        folder.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js", "page.jinja")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals |= {"draw": _draw, "swatch": lambda index, line: Markup(svg.swatch(index, line))}
    charts = report.charts
    idents = {id(chart): f"chart-{number}" for number, chart in enumerate(charts, start=1)}
    names = {id(chart): name for chart, name in zip(charts, picture_names(charts), strict=True) if pictures}
    return environment.from_string(template).render(
        title=title or _title(report),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=hybridlm.__version__,
        report=report,
        ident_of=lambda chart: idents[id(chart)],
        picture_of=lambda chart: names.get(id(chart), ""),
        policy=f"{_POLICY}; style-src {_hash(style)}; script-src {_hash(script)}",
        style=Markup(style),
        script=Markup(script),
    )


def _draw(chart: Chart, ident: str) -> Markup:
    return Markup(svg.draw(chart, ident))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(report: Report) -> str:
    kinds = list(dict.fromkeys(source.kind for source in report.sources))
    words = {"eval": "scores", "race": "races", "training": "training", "check": "state checks",
             "isoflop": "equal FLOPs", "memory": "memories"}  # fmt: skip
    said = [words[kind] for kind in kinds]
    return f"hybridlm: {', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else f"hybridlm: {said[0]}"


def picture_names(charts: Sequence[Chart]) -> list[str]:
    """File names from titles: letters and digits, each only once."""
    found: list[str] = []
    for chart in charts:
        letters = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in chart.title.lower())
        stem = "-".join(part for part in letters.split("-") if part)[:80] or "chart"
        name, number = f"{stem}.png", 2
        while name in found:
            name, number = f"{stem}-{number}.png", number + 1
        found.append(name)
    return found


def write_report(report: Report, out: str | Path, title: str = "") -> tuple[Path, list[Path]]:
    """Write the page, and pictures where matplotlib is installed.

    Args:
        report: What to write.
        out: Folder; made if need be.
        title: Heading of the page.

    Returns:
        The page and the pictures; no pictures where matplotlib is missing.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder = writable_folder(out)
    pictures = []
    try:
        from .png import save
    except ImportError:
        charts = []
    else:
        charts = report.charts
    for chart, name in zip(charts, picture_names(charts), strict=True):
        save(chart, folder / name)
        pictures.append(folder / name)
    page = folder / PAGE
    # a lone half of a surrogate pair, which JSON may hold, is no text that can be written
    page.write_bytes(render(report, title, bool(pictures)).encode("utf-8", errors="replace"))
    return page, pictures
