"""`hybridlm eval`: score a model on tasks that are made offline, and print what is above chance."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

_WIDTH = 160  # where there is no terminal: rich would cut a table to 80 columns

Model = Annotated[Path, typer.Argument(help="Model folder with its tokenizer: ours or transformers'.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results; a run that was stopped goes on there.")]
Name = Annotated[str, typer.Option(help="What results call the model; by default its folder's name.")]
Suite = Annotated[str, typer.Option(help="recall, ruler, babi, length or all.")]
Lengths = Annotated[str, typer.Option(help="Tokens of a prompt with its answer, '256,512'; by default up to 1024.")]
Beyond = Annotated[int, typer.Option(help="Allow lengths of this many times the length trained for.")]
Samples = Annotated[int, typer.Option(help="Documents for each task and length.")]
Generated = Annotated[int, typer.Option(help="Of these, how many are answered by generating too.")]
NoGenerate = Annotated[bool, typer.Option("--no-generate", help="Score by likelihood alone.")]
Seed = Annotated[int, typer.Option(help="Of the documents.")]
Haystack = Annotated[str, typer.Option(help="sentences, noise or stdlib; by default what each task is known for.")]
Questions = Annotated[str, typer.Option(help="JSON lines of question, answers and paragraphs for RULER's questions.")]
Text = Annotated[str, typer.Option(help="File or folder for bits per byte; by default the standard library.")]
Dtype = Annotated[str, typer.Option(help="fp64, fp32, bf16 or fp16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens that go through the model together.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the folder ships.")]


def evaluate(
    model: Model,
    out: Out,
    suite: Suite = "all",
    name: Name = "",
    lengths: Lengths = "",
    beyond: Beyond = 1,
    samples: Samples = 32,
    generated: Generated = 8,
    no_generate: NoGenerate = False,
    seed: Seed = 0,
    haystack: Haystack = "",
    questions: Questions = "",
    text: Text = "",
    dtype: Dtype = "fp32",
    device: Device = "",
    batch_tokens: BatchTokens = 8192,
    trust_remote_code: Trust = False,
) -> None:
    """Score recall, long context, facts in filler and bits per byte; what is not above chance says so.

    Writes SUITE.json and SUITE.md into the results folder. Stopped at any moment, the same command goes on.
    """
    from .evaluation.haystack import check_haystack
    from .evaluation.loading import load
    from .evaluation.runner import Settings, writable_folder, write_whole
    from .evaluation.runner import evaluate as run
    from .evaluation.tables import markdown
    from .testing.base import quiet

    settings = Settings(
        suite=suite,
        lengths=_numbers(lengths),
        beyond=beyond,
        samples=samples,
        generated=0 if no_generate else min(generated, samples),
        seed=seed,
        haystack=haystack or None,
        questions=questions or None,
        text=text or None,
        batch_tokens=batch_tokens,
    )
    settings.check()
    if haystack:
        check_haystack(haystack)
    writable_folder(out)
    with quiet():
        found = load(model, dtype=dtype, device=device or None, trust_remote_code=trust_remote_code)
        found = replace(found, name=name or found.name)
        with _progress(found.name) as progress:
            results = run(found, settings, out, progress)
    write_whole(out / f"{suite}.md", markdown(results))
    _print(results)
    typer.echo(f"{results['seconds']:.0f} s; wrote {out / suite}.json and {out / suite}.md")


def _numbers(text: str) -> tuple[int, ...] | None:
    """`256,512` as numbers; `None` for nothing."""
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--lengths: {text!r} is no list of whole numbers, expected as in 256,512") from None


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the error stream where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # without a terminal a finished bar would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def show(cell: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: {cell}", completed=done, total=total)

        yield show


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .evaluation.tables import AT_CHANCE, HEADER, notes, rows

    table = Table(title=f"{results['model']['name']}, suite {results['settings']['suite']}")
    for title in HEADER:
        table.add_column(title, justify="left" if title == "task" else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row, style="dim" if row[3].startswith((AT_CHANCE, "does not")) else None)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    for note in notes(results):
        typer.echo(note)
