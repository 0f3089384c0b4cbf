"""`hybridlm report`: results as one page that works offline."""

from pathlib import Path
from typing import Annotated

import typer

_MOST_NAMED = 5  # files that hold no results

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Folders or JSON files: results of eval, race, train and check, mixed."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for report.html and its pictures.")]

Title = Annotated[str, typer.Option(help="Heading of the page; by default what is in it.")]


def report(runs: Runs, out: Out, title: Title = "") -> None:
    """Make one self-contained HTML page of results: tables, heat-maps and curves, with every file named by its hash.

    PNG pictures of the charts lie beside the page where matplotlib (extra `plot`) is installed.
    """
    from .report import make_report, write_report

    made = make_report(runs)
    page, pictures = write_report(made, out, title)
    if made.ignored:
        more = len(made.ignored) - _MOST_NAMED
        named = ", ".join(made.ignored[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        typer.echo(f"left out, since they hold no results: {named}")
    kinds = [source.kind for source in made.sources]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    copies = sum(len(source.copies) for source in made.sources)
    left_out = f"; left out as copies: {copies}" if copies else ""
    typer.echo(f"read {len(kinds)} file{'s' * (len(kinds) != 1)}: {counts}{left_out}")
    if pictures:
        typer.echo(f"wrote {page} and {len(pictures)} pictures")
    elif made.charts:
        typer.echo(f"wrote {page}; its {len(made.charts)} pictures are left out: pip install 'hybridlm[plot]'")
    else:
        typer.echo(f"wrote {page}")
