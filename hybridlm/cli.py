"""The `hybridlm` command: look at models, train and evaluate them, move them in and out of native formats.

A mistake of the user ends in one line and exit code 2; `HYBRIDLM_DEBUG=1` shows the traceback. torch and transformers
are imported by the commands that need them, so that `hybridlm list` answers at once.
"""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import presets
from .cli_check import check
from .cli_eval import evaluate
from .cli_publish import card, publish, verify
from .cli_race import race
from .cli_report import report

if TYPE_CHECKING:
    from .analysis.figures import Figures, Plan


_PACKAGES = ("hybridlm", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "peft")
_KERNEL_PACKAGES = ("mamba-ssm", "causal-conv1d", "flash-linear-attention", "flash-attn")


class _OneLineErrors(TyperGroup):
    """Report what the user got wrong without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, NotImplementedError) as error:
            if os.environ.get("HYBRIDLM_DEBUG"):
                raise
            typer.echo(f"hybridlm: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hybrid language models as lists of named parts.",
)

app.command()(check)
app.command("eval")(evaluate)
app.command()(card)
app.command()(verify)
app.command()(publish)
app.command()(race)
app.command()(report)

Source = Annotated[Path, typer.Argument(help="Model folder: config.json and safetensors.")]
Target = Annotated[Path, typer.Argument(help="Folder to write.")]


@app.command("list")
def list_presets() -> None:
    """List the model configs that come with the package."""
    for name in presets.preset_names():
        config = json.loads(presets.find_config(name).read_text(encoding="utf-8"))
        stack = f"{config['num_hidden_layers']:>3} layers, width {config['hidden_size']:>4}"
        typer.echo(f"{name:<20} {stack}   {config.get('extra', {}).get('source', '')}")


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A preset, a config.json, or a model folder.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of context that the state figures are for.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Number format: fp32, bf16, fp16 or fp64.")] = "bf16",
    rollback: Annotated[int, typer.Option(min=0, help="Recorded tokens that crop() may take back.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the stack layer by layer: parameters, active parameters, state bytes and FLOPs. Builds no weights."""
    config = presets.load_config(name)
    from .analysis.planner import plan

    result = plan(config, context=context, dtype=dtype, rollback_window=rollback)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print_plan(name, result)


def _print_plan(name: str, plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    total = plan.total
    moving = total.expected_step_flops != total.step_flops  # the data decide what runs
    depth = f"{len(plan.layers)} layer{'s' * (len(plan.layers) != 1)}"
    table = Table(title=f"{name}: {depth}, state at {_tokens(plan.context)} in {plan.dtype}, one row")
    for title in ("layer", "recipe", "mixer", "channel mixer"):
        table.add_column(title)
    for title in ("parameters", "active", "state bytes", "FLOPs / token", *(["expected"] if moving else [])):
        table.add_column(title, justify="right")
    for layer in plan.layers:
        label = (str(layer.index), layer.recipe, layer.mixer or "-", layer.channel_mixer or "-")
        table.add_row(*label, *_figures(layer, moving))
    table.add_section()
    for span in plan.spans:
        place = str(span.start) if span.stop - span.start == 1 else f"{span.start}..{span.stop - 1}"
        table.add_row(place, span.span, "(span)", "", *_figures(span, moving))
    if plan.spans:
        table.add_section()
    table.add_row("", "outside the layers", "", "", *_figures(plan.outer, moving))
    table.add_row("", "total, at most" if moving else "total", "", "", *_figures(total, False))
    if moving:
        likely = (total.num_parameters, total.expected_active_parameters, total.expected_state_bytes)
        flops = ("", f"{total.expected_step_flops:,}")
        table.add_row("", "expected at the target", "", "", *(f"{n:,}" for n in likely), *flops)
    # rich cuts a table to 80 columns where it cannot see a terminal
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    _print_reach(plan)
    if plan.rollback_window:
        count = _tokens(plan.rollback_window)
        typer.echo(f"recording {count} for rollback: at most {plan.rollback_bytes:,} bytes more")
    bound = f"prefill of {_tokens(plan.context)}: {total.prefill_flops:,} FLOPs"
    same = total.expected_prefill_flops == total.prefill_flops
    typer.echo(bound if same else f"{bound} at most, {total.expected_prefill_flops:,} expected at the target")


def _print_reach(plan: "Plan") -> None:
    """Say of every span how many tokens enter its layers."""
    for span in plan.spans:
        one = span.stop - span.start == 1
        place = f"layer {span.start}" if one else f"layers {span.start} to {span.stop - 1}"
        bound = f"at most {span.max_tokens:,}" if span.max_tokens < plan.context else "no bound"
        target = f"target {span.expected_share:.4g} of the tokens that come to it"
        count = f"of {_tokens(plan.context)} {span.expected_tokens:,} expected, {bound}"
        typer.echo(f"{span.span}, {place}: {target}; {count}")


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def _figures(row: "Figures", moving: bool) -> tuple[str, ...]:
    numbers = [row.num_parameters, row.num_active_parameters, row.state_bytes, row.step_flops]
    return tuple(f"{n:,}" for n in [*numbers, *([row.expected_step_flops] if moving else [])])


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="A run file (YAML), or the name of one that comes with the package.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[PATH=VALUE]...", help="Replace settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train or fine-tune from a run file; the exit code is 1 when a demand of the file is not met."""
    from .training import CheckpointError
    from .training import train as run_training

    try:
        run_training(run, settings or (), resume=resume)
    except CheckpointError as error:
        raise OSError(str(error)) from error


@app.command("import")
def import_checkpoint(src: Source, out: Target) -> None:
    """Turn a native folder (Llama, Mistral, Mixtral, Jamba, Mamba, Mamba-2, Bamba) into a hybridlm folder."""
    from .hub.native import import_native

    import_native(src, out)
    typer.echo(f"wrote {out}")


@app.command("export")
def export_checkpoint(src: Source, out: Target) -> None:
    """Turn a hybridlm folder back into the native format, if its config equals a native family."""
    from .hub.native import export_native

    export_native(src, out)
    typer.echo(f"wrote {out}")


@app.command("upcycle")
def upcycle_checkpoint(
    src: Source,
    out: Target,
    experts: Annotated[int, typer.Option(help="Experts a layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts a token.")] = 2,
    layers: Annotated[str, typer.Option(help="'every_other', 'all', or depths: '1,3,5'.")] = "every_other",
    noise: Annotated[float, typer.Option(help="Noise on the copies, as a fraction of each weight's spread.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the new routers and the noise.")] = 0,
) -> None:
    """Turn the SwiGLU of some layers into experts that are its copies: the same logits, and room to learn."""
    from .hub.upcycle import upcycle

    if not src.exists() and str(src).replace("-", "_") in presets.preset_names():
        raise ValueError(
            f"{src}: a preset is a config without weights; build the model, train it and write its folder with "
            "save_pretrained first, then upcycle that folder"
        )
    depths = [depth.strip() for depth in layers.split(",")]
    numbers = [int(depth) for depth in depths] if all(depth.isdigit() for depth in depths) else layers
    upcycle(src, out, num_experts=experts, top_k=top_k, layers=numbers, noise=noise, seed=seed)
    typer.echo(f"wrote {out}")


@app.command()
def doctor() -> None:
    """Say which versions are installed, and which backend each mixer would use and why."""
    import torch

    from .modeling.registry import MIXERS

    typer.echo(f"{'python':<22} {platform.python_version()}")
    for package in (*_PACKAGES, *_KERNEL_PACKAGES):
        typer.echo(f"{package:<22} {_version(package)}")
    typer.echo(f"{'GPU':<22} {torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'none'}")
    for name in sorted(MIXERS):
        backend = "attn_implementation of the model (sdpa by default)" if name == "attention" else "plain PyTorch"
        why = "" if name == "attention" else ": this version calls no kernel package for it"
        typer.echo(f"mixer {name:<16} {backend}{why}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    app()
