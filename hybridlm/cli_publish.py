"""`hybridlm card`, `verify` and `publish`: cards that cannot lie, and folders that do what they say."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="Model folder: config.json, safetensors and code.")]
Source = Annotated[str, typer.Argument(metavar="FOLDER_OR_PRESET", help="A model folder, or a preset by name.")]
Results = Annotated[list[str] | None, typer.Option(help="Folder or file of results; may be given several times.")]
Out = Annotated[Path | None, typer.Option(help="Write the card there and leave the folder as it is.")]
Facts = Annotated[str | None, typer.Option(help="Name of a zoo model, or a YAML file, whose words the card takes.")]
Name = Annotated[str | None, typer.Option(help="What the card calls the model.")]
Dtype = Annotated[str, typer.Option(help="What logits are compared in: float32, bfloat16 or float16.")]
Repo = Annotated[str, typer.Option(help="ORG/NAME on the Hub; made if it does not exist.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and show, upload nothing.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private.")]
Revision = Annotated[str | None, typer.Option(help="Branch to upload to; made if it does not exist.")]


def card(source: Source, results: Results = None, out: Out = None, facts: Facts = None, name: Name = None) -> None:
    """Make a folder ready for the Hub: pruned code, golden logits, results, and a card of numbers with a source.

    Of a preset, and with --out, only the card is written, to the file or to the standard output.
    """
    from .hub.cards import render_card
    from .hub.folder import build_bundle, prepare
    from .testing.base import quiet

    if out is None and Path(source).is_dir():
        with quiet():
            removed = prepare(source, results or (), facts=facts, name=name)
        typer.echo(f"wrote {Path(source) / 'README.md'}, results/ and golden/ beside it")
        if removed:
            typer.echo(f"removed {len(removed)} code files that the config does not use: {' '.join(removed)}")
        return
    text = render_card(build_bundle(source, results or (), facts, name)).text
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {out}")


def verify(folder: Folder, dtype: Dtype = "float32") -> None:
    """Check hashes, golden logits, the card's numbers, and that nothing is pickled; the exit code is 1 if not.

    The folder is loaded in a process of its own, by the code that it ships: verify what you would load.
    """
    from .hub.verify import verify as check
    from .testing.base import quiet

    with quiet():
        problems = check(folder, dtype=dtype)
    _refuse(problems)
    typer.echo(f"{folder}: its hashes, its logits in {dtype} and every number on its card are as stored")


def publish(
    folder: Folder, repo: Repo, dry_run: DryRun = False, private: Private = False, revision: Revision = None
) -> None:
    """Check a folder, show what would be uploaded, and upload it; after a break the same command goes on.

    The token is that of `hf auth login` or HF_TOKEN. The exit code is 1 if the folder is refused.
    """
    from .hub.publish import check_publishable, check_repo, upload, uploads
    from .testing.base import quiet

    check_repo(repo)
    with quiet():
        problems = check_publishable(folder)
    _refuse(problems)
    files = uploads(folder)
    for file in files:
        typer.echo(f"{file.sha256[:16]}  {file.size:>15,}  {file.path}")
    typer.echo(f"{len(files)} files, {sum(file.size for file in files):,} bytes, to {repo}")
    if dry_run:
        typer.echo("dry run: all checks passed, nothing was uploaded")
        return
    typer.echo(f"uploaded: {upload(folder, repo, private=private, revision=revision, said=typer.echo)}")


def _refuse(problems: list[str]) -> None:
    """End with exit code 1 if there are any."""
    for problem in problems:
        typer.echo(f"refused: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
