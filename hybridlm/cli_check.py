"""`hybridlm check`: hold models to the promises of their state, and print, save or publish what was found."""

import difflib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import presets

if TYPE_CHECKING:
    from rich.console import Console

    from .testing.report import Report

_COLOURS = {"ok": "green", "differs": "bold red", "raises": "bold red", "refused": "yellow"}
_WIDTH = 160  # where there is no terminal: rich would cut a table to 80 columns
_CELL = 9

Models = Annotated[
    list[str] | None,
    typer.Argument(help="Model folders, hub ids, or presets by name.", show_default=False),
]
Native = Annotated[str, typer.Option(help="Families of transformers, 'llama,mamba' or 'all': small random twins.")]
MOST_PARAMETERS = 500_000_000  # of a preset, which is built with random weights
Zoo = Annotated[bool, typer.Option("--zoo", help="All presets called tiny_*.")]
Select = Annotated[str, typer.Option(help="Checks to run, 'left_padding,packed': names or how they begin.")]
TimeLimit = Annotated[float, typer.Option(min=0, help="Seconds that one check may take; 0 for no limit.")]
Dtype = Annotated[str, typer.Option(help="fp64, fp32, bf16 or fp16; by default fp64 where it runs, else fp32.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; by default where the model is.")]
Seed = Annotated[int, typer.Option(help="Where all random choices start.")]
Inductor = Annotated[bool, typer.Option("--inductor", help="Compile with inductor, which needs a C++ compiler.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a folder or the hub ships.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")]
Markdown = Annotated[Path | None, typer.Option(help="Write Markdown, as for a model card.")]
Names = Annotated[bool, typer.Option("--list", help="List the checks and what they promise.")]


def check(
    models: Models = None,
    native: Native = "",
    zoo: Zoo = False,
    select: Select = "",
    time_limit: TimeLimit = 60.0,
    dtype: Dtype = "",
    device: Device = "",
    seed: Seed = 0,
    inductor: Inductor = False,
    trust_remote_code: Trust = False,
    json: Json = None,
    markdown: Markdown = None,
    list_checks: Names = False,
) -> None:
    """Check that chunks, pads, packing, beams, rollback and training change nothing, for any causal language model.

    The exit code is 0 only if every model could be checked and nothing differs or raises.
    """
    if list_checks:
        _print_checks()
        return
    sources = _sources(models or [], native, zoo)
    if not sources:
        raise ValueError("check: name a model, --native FAMILIES or --zoo")
    from rich.console import Console

    from .testing.runner import check_model

    names = [name.strip() for name in select.split(",") if name.strip()] or None
    options = {"select": names, "time_limit": time_limit or None, "dtype": dtype or None, "device": device or None}
    options |= {"seed": seed, "inductor": inductor, "trust_remote_code": trust_remote_code}
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    reports = []
    with _progress(len(sources)) as advance:
        for number, (name, make) in enumerate(sources):
            reports.append(_checked(name, make, check_model, options, advance(name, number)))
    _print(reports, console)
    _write(reports, json, markdown)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def _sources(models: list[str], native: str, zoo: bool) -> list[tuple[str, Callable[[], Any]]]:
    """What to check: names, and functions that give a config, a folder or a hub id."""

    def config_of(name: str) -> Callable[[], Any]:
        return lambda: _small_preset(name)

    def twin_of(family: str) -> Callable[[], Any]:
        from .testing.native import native_config

        return lambda: native_config(family)

    known = presets.preset_names()
    found = []
    for name in models:
        is_folder = Path(name).is_dir()
        is_preset = not is_folder and name.replace("-", "_") in known
        near = "/" not in name and difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near and not is_preset and not is_folder:  # a slip, not an id to ask the Hub for
            found.append((name, lambda name=name: presets.find_config(name)))
        else:
            found.append((name, config_of(name) if is_preset else (lambda name=name: name)))
    if native:
        from .testing.native import split_families

        found += [(family, twin_of(family)) for family in split_families(native)]
    if zoo:
        found += [(name, config_of(name)) for name in known if name.startswith("tiny_")]
    return found


def _small_preset(name: str) -> Any:
    from .analysis.planner import plan

    config = presets.load_config(name)
    size = plan(config).total.num_parameters
    if size > MOST_PARAMETERS:
        raise ValueError(f"{name}: {size:,} parameters are too many to build for a check; check tiny_{name}")
    return config


def _checked(name: str, make: Callable[[], Any], check_model: Any, options: dict[str, Any], progress: Any) -> "Report":
    """One report; a model that cannot even be named is a report with a problem, so that the others still run."""
    from .testing.report import Report

    try:
        source = make()
    except (ValueError, OSError) as error:
        return Report(model=name, problem=" ".join(str(error).split()))
    return check_model(source, name=name, progress=progress, **options)


class _progress:  # noqa: N801 - used as a function
    """A bar on the error stream where that is a terminal.

    Args:
        total: Number of models.
    """

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.total, self.bar = total, Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Callable[[str, int], Callable[[str, int, int], None]]:
        self.bar.__enter__()
        self.task = self.bar.add_task("", total=None)
        return self._model

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def _model(self, name: str, number: int) -> Callable[[str, int, int], None]:
        where = f"{name} ({number + 1} of {self.total})" if self.total > 1 else name

        def show(check: str, done: int, total: int) -> None:
            self.bar.update(self.task, description=f"{where}: {check}", completed=done, total=total)

        return show


def _print(reports: list["Report"], console: "Console") -> None:
    checked = [report for report in reports if not report.problem]
    if len(checked) == 1:
        console.print(_table(checked[0]))
    for group in _groups(checked, console.width) if len(checked) > 1 else ():
        console.print(_matrix(group))
    if len(checked) > 1:
        for report in checked:
            for result in report.results:
                if result.verdict in ("differs", "raises", "refused"):
                    error = "" if result.error is None else f" (error {result.error:.1e})"
                    line = f"{report.model} {result.check} {result.verdict}{error}"
                    typer.echo(f"{line}: {result.reason}" if result.reason else line)
    for report in reports:
        typer.echo(f"{report.model}: {report.problem}" if report.problem else f"{report.model}: {report.headline()}")


def _table(report: "Report") -> Any:
    """Every check of one model."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.model} in {report.dtype}, seed {report.seed}")
    for title in ("check", "promise"):
        table.add_column(title)
    for title in ("error", "tolerance", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    for r in report.results:
        figures = ["" if value is None else f"{value:.1e}" for value in (r.error, r.tolerance)]
        verdict = Text(r.verdict, style=_COLOURS.get(r.verdict, "dim"))
        if r.reason:
            verdict.append(f": {r.reason}", style="default")
        table.add_row(r.check, r.promise, *figures, f"{r.seconds:.1f}", verdict)
    return table


def _groups(reports: list["Report"], width: int) -> Iterator[list["Report"]]:
    """As many models side by side as fit."""
    first = max(len(result.check) for report in reports for result in report.results) + 4
    group: list[Report] = []
    used = first
    for report in reports:
        cell = max(len(report.model), _CELL) + 3
        if group and used + cell > width:
            yield group
            group, used = [], first
        group.append(report)
        used += cell
    if group:
        yield group


def _matrix(reports: list["Report"]) -> Any:
    """A row for each check, a column for each model."""
    from rich.table import Table
    from rich.text import Text

    from .testing.report import summary_rows

    table = Table()
    table.add_column("check", no_wrap=True)
    for report in reports:
        table.add_column(report.model, no_wrap=True)
    for name, *cells in summary_rows(reports):
        styles = {"ok": "green", "refused": "yellow", "–": "dim", "": "dim"}
        table.add_row(name, *(Text(cell, style=styles.get(cell, "bold red")) for cell in cells))
    table.add_section()
    table.add_row("seconds", *(f"{report.seconds:.0f}" for report in reports))
    return table


def _write(reports: list["Report"], json: Path | None, markdown: Path | None) -> None:
    from .testing.report import findings_markdown, summary_json, summary_markdown

    command = _command(sys.argv[1:])
    if json is not None:
        json.write_text(summary_json(reports, command) + "\n", encoding="utf-8")
    if markdown is not None:
        text = reports[0].to_markdown()
        if len(reports) > 1:
            text = f"{summary_markdown(reports, command)}\n{findings_markdown(reports)}"
        markdown.write_text(text, encoding="utf-8")


def _command(arguments: list[str]) -> str:
    """The command without where it writes to."""
    kept, skip = ["hybridlm"], False
    for argument in arguments:
        if not skip and not argument.startswith(("--json", "--markdown")):
            kept.append(argument)
        skip = argument in ("--json", "--markdown")
    return shlex.join(kept)


def _print_checks() -> None:
    from .testing.suite import EVERY, OURS

    for title, rows in (("any causal language model:", EVERY), ("models with new_cache():", OURS)):
        typer.echo(title)
        for row in rows:
            typer.echo(f"  {row.name:<34} {row.promise}")
