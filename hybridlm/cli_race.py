"""`hybridlm race`: train small architectures on one synthetic task, and print which learns it and how fast."""

import logging
import shlex
from pathlib import Path
from typing import Annotated

import typer

File = Annotated[str, typer.Argument(help="A race file (YAML), or the name of one that comes with the package.")]
Out = Annotated[str, typer.Option("--out", help="Folder for the results; by default outputs/races/NAME.")]
Jobs = Annotated[int, typer.Option(help="Processes, of one thread each.")]
Seeds = Annotated[int | None, typer.Option(help="Runs of each arm, instead of the file's number.")]
Quick = Annotated[bool, typer.Option("--quick", help="One seed and 20 steps: does it run at all?")]
List = Annotated[bool, typer.Option("--list", help="List the races that come with the package.")]


def race(
    file: File = "", out: Out = "", jobs: Jobs = 2, seeds: Seeds = None, quick: Quick = False, list_all: List = False
) -> None:
    """Train several architectures on one task, and say whether what is known of them shows.

    Writes race.json, plots and the best model into the results folder. Stopped at any moment, the same command goes on.
    """
    from .race import load_race, race_names, run_race
    from .race.arms import enter
    from .race.load import in_file
    from .race.race import WINNER
    from .race.report import table
    from .testing.base import quiet

    if list_all:
        for name in race_names():
            typer.echo(f"{name:<16} {load_race(name).title}")
        return
    if not file:
        raise ValueError(f"FILE: missing, expected a path or one of {race_names()}")
    chosen = load_race(file, seeds=seeds, quick=quick)
    name = Path(file).stem
    folder = Path(out or f"outputs/races/{name}{'_quick' if quick else ''}")
    with in_file(file):
        entrants = enter(chosen)
    _log_to_stderr()
    with quiet():
        results = run_race(chosen, name, folder, jobs, typer.echo, entrants)
    typer.echo(table(chosen, results["arms"]))
    for line in results["summary"]:
        typer.echo(line)
    best = results["winner"]
    typer.echo(
        f"{results['seconds']:.0f} s, {results['process_seconds']:.0f} s of processors; wrote {folder}/race.json"
    )
    command = shlex.join(
        ["hybridlm", "eval", f"{folder}/{WINNER}", "--suite", "recall", "--out", f"{folder}/winner_eval"]
    )
    typer.echo(f"best: {best['arm']}, seed {best['seed']}; `{command}` scores it")


def _log_to_stderr() -> None:
    """A line with the time for every run that ends; those of the processes go the same way."""
    from .evaluation.runs import set_up_logging

    set_up_logging(logging.getLogger("hybridlm.race"))
