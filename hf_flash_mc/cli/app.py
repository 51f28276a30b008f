"""The ``hf-flash-mc`` command: each subcommand prints what a function elsewhere returns."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Exact, fast attention for transformers models.")
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one")]


def show_version(wanted: bool) -> None:
    if wanted:
        from hf_flash_mc import __version__

        typer.echo(f"hf-flash-mc {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version, do nothing")
    ] = False,
) -> None:
    """Exact, fast attention for transformers models."""


@app.command()
def env() -> None:
    """Versions, GPU, which back end runs and why, and the tuning cache: a block to paste into an issue."""
    from hf_flash_mc.cli.environment import describe_environment

    typer.echo("```text\n" + describe_environment() + "\n```")


@app.command()
def models(name: str = typer.Argument("", help="A part of a model type's or family's name; empty: all.")) -> None:
    """Every model type of transformers: exact, refused and why, or not tested and why. Exit code 1: no such type."""
    from hf_flash_mc.patches import table

    found = table.lines(name)
    for line in found:
        typer.echo(line)
    if not found:
        typer.echo(f"hf-flash-mc models: no model type of the table has {name!r} in its name", err=True)
        raise typer.Exit(1)


@app.command()
def check(
    device: Device = None,
    impl: Annotated[str, typer.Option(help="auto, or a back end that every case must run on")] = "auto",
    only: Annotated[str, typer.Option(help="the cases whose name holds this")] = "",
) -> None:
    """The accuracy suite on this device in about a minute: values and gradients against float64. Exit code 1: wrong."""
    from hf_flash_mc.measure import check as suite

    try:
        outcomes = suite.run_suite(chosen_device(device), impl, only)
    except ValueError as error:
        raise fail("check", error) from None
    typer.echo(suite.report(outcomes))
    bad = sum(not x.ok for x in outcomes)
    typer.echo(f"{len(outcomes) - bad} of {len(outcomes)} cases within the error bound")
    if bad:
        typer.echo("Please report it with the output of hf-flash-mc env.")
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Times against the peers that are installed, checked first; a CSV. --help shows its options."""
    from hf_flash_mc.measure import run

    raise typer.Exit(run.main(context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def evaluate(context: typer.Context) -> None:
    """What gists and lenses of MegaContext cost on next tokens, with every baseline in one table; --help: options."""
    from hf_flash_mc.megacontext import evaluate as quality

    try:
        quality.main(context.args)
    except (ValueError, OSError) as error:  # OSError: transformers' for a model that it does not find
        raise fail("evaluate", error) from None


@app.command()
def tune(
    shapes: Annotated[
        list[str] | None,
        typer.Argument(help="as in d128-causal-b4-h32:8-q4096-k4096; without, the usual lengths of training"),
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    most: Annotated[int | None, typer.Option(help="try at most so many configurations of a kernel")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be stored, store nothing")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="forget what was found on this GPU, tune nothing")] = False,
) -> None:
    """The fastest tile sizes for shapes of yours on this GPU, checked and timed; kept in a file of the user's."""
    from hf_flash_mc.measure import tune as search

    try:
        if clear:
            typer.echo(search.clear())
            return
        typer.echo(search.tune(list(shapes or search.DEFAULT_SHAPES), chosen_device(device), dtype, most, dry_run))
    except (ValueError, RuntimeError) as error:
        raise fail("tune", error) from None


def chosen_device(name: str | None) -> str:
    """The device's name, or the GPU's where there is one.

    Raises:
        ValueError: where torch cannot use it.
    """
    import torch

    from hf_flash_mc.measure.run import check_device

    return str(check_device(name or ("cuda" if torch.cuda.is_available() else "cpu")))


def fail(command: str, error: Exception) -> typer.Exit:
    """The error as one line on stderr, and exit code 2."""
    typer.echo(f"hf-flash-mc {command}: {error}", err=True)
    return typer.Exit(2)
